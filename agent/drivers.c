/* Drivers on demand: device nodes that load their driver when they are opened, and the kernel's requests for modules,
 * which the agent serves in images that have no kmod. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "beneath.h"
#include "system.h"

#define REQUESTS "/proc/sys/kernel/modprobe"

/* What systemd's udev gives such nodes (50-udev-default.rules, `static_node`); root's alone are all others. */
static const struct node_rule {
    const char *name, *group;
    mode_t mode;
} rules[] = {
    {"net/tun", "root", 0666},        {"fuse", "root", 0666},          {"vfio/vfio", "root", 0666},
    {"loop-control", "disk", 0660},   {"btrfs-control", "disk", 0660}, {"kvm", "kvm", 0660},
    {"vhost-net", "kvm", 0660},       {"vhost-vsock", "kvm", 0660},    {"snd/seq", "audio", 0660},
    {"snd/timer", "audio", 0660},     {"rfkill", "root", 0664},        {"kfd", "render", 0660},
};

int modules_open(void) {
    struct utsname name;
    char path[128];
    uname(&name);
    snprintf(path, sizeof path, MODULES "%s", name.release);
    int modules = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (modules < 0 || faccessat(modules, "modules.dep", R_OK, 0) < 0) {
        if (modules >= 0)
            close(modules);
        modules = open(SPARE_MODULES, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    }
    return modules;
}

/* `path` is below /dev and begins with a slash. */
static void make_node(int devices, const char *path, mode_t type, dev_t device) {
    struct node_rule rule = {NULL, "root", 0600};
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (strcmp(rules[i].name, path + 1) == 0)
            rule = rules[i];
    char leaf[NAME_MAX + 1], user[64];
    struct account account;
    struct failure failure;
    int parent = open_parent_in_root(devices, path, leaf);
    /* what the driver has made already, or another one of that number, stays as it is */
    if (parent >= 0 && mknodat(parent, leaf, type | rule.mode, device) == 0) {
        snprintf(user, sizeof user, "0:%s", rule.group);
        bool known = account_find(user, &account, &failure) == 0;
        if (fchownat(parent, leaf, 0, known ? account.gid : 0, AT_SYMLINK_NOFOLLOW) < 0 ||
            fchmodat(parent, leaf, rule.mode, 0) < 0)
            console_print("cannot set the mode of /dev%s: %s", path, strerror(errno));
    }
    if (parent >= 0)
        close(parent);
}

/* Each line is MODULE NAME and c or b with MAJOR:MINOR (depmod(8), modules.devname). */
static void make_nodes(int modules) {
    int fd = openat(modules, "modules.devname", O_RDONLY | O_CLOEXEC);
    FILE *list = fd < 0 ? NULL : fdopen(fd, "r");
    int devices = open("/dev", O_PATH | O_DIRECTORY | O_CLOEXEC);
    char line[512], name[128], path[PATH_MAX + 1] = "/", type;
    unsigned major_number, minor_number;
    while (list && devices >= 0 && fgets(line, sizeof line, list))
        if (sscanf(line, "%*s %127s %c%u:%u", name, &type, &major_number, &minor_number) == 4 &&
            (type == 'c' || type == 'b') && normalise_name(name, path + 1) && path[1])
            make_node(devices, path, type == 'c' ? S_IFCHR : S_IFBLK, makedev(major_number, minor_number));
    if (list)
        fclose(list);
    else if (fd >= 0)
        close(fd);
    if (devices >= 0)
        close(devices);
}

/* The service that makes these nodes runs where there is a modules.devname, and fails without kmod. */
static void mask_static_nodes(void) {
    static const char *const programs[] = {"/bin/kmod", "/usr/bin/kmod", "/sbin/kmod", "/usr/sbin/kmod"};
    for (size_t i = 0; i < sizeof programs / sizeof *programs; i++)
        if (access(programs[i], X_OK) == 0)
            return;
    struct failure failure;
    int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int units = directory_open(root, "/run/systemd/system", &failure);
    if (units < 0)
        console_print("%s", failure.message);
    else if (symlinkat("/dev/null", units, "kmod-static-nodes.service") < 0 && errno != EEXIST)
        console_print("cannot mask kmod-static-nodes.service: %s", strerror(errno));
    if (units >= 0)
        close(units);
    close(root);
}

/* The kernel starts the program as one that has the root directory of PID 1, whose threads it shares that with. By the
 * way of /proc nothing has to be in the image for it. */
void drivers_serve(pid_t pid) {
    char program[32];
    snprintf(program, sizeof program, "/proc/%d/exe", (int)pid);
    write_setting(REQUESTS, program);
}

void drivers_prepare(bool own_init) {
    int modules = modules_open();
    if (modules < 0)
        return;
    make_nodes(modules);
    close(modules);
    drivers_serve(getpid());
    if (own_init)
        mask_static_nodes();
}
