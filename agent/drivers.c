/* Drivers on demand: device nodes that load their driver when they are opened, and the kernel's requests for modules,
 * which the agent serves in images that have no kmod. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "beneath.h"
#include "system.h"

#define REQUESTS "/proc/sys/kernel/modprobe"

/* What systemd's udev gives devices that are not for root alone (50-udev-default.rules), in images without it; no group
 * is root's. */
static const struct access_rule {
    const char *name, *group;
    mode_t mode;
} rules[] = {
    {"net/tun", "", 0666},          {"fuse", "", 0666},              {"vfio/vfio", "", 0666},
    {"vsock", "", 0666},            {"rfkill", "", 0664},            {"kfd", "render", 0660},
    {"loop-control", "disk", 0660}, {"btrfs-control", "disk", 0660}, {"kvm", "kvm", 0660},
    {"vhost-net", "kvm", 0660},     {"vhost-vsock", "kvm", 0660},    {"snd/seq", "audio", 0660},
    {"snd/timer", "audio", 0660},
};

int modules_open(void) {
    struct utsname name;
    char path[128];
    uname(&name);
    snprintf(path, sizeof path, MODULES "%s", name.release);
    int modules = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return modules >= 0 ? modules : open(SPARE_MODULES, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* Each line is MODULE NAME and c or b with MAJOR:MINOR (depmod(8), modules.devname). What a driver has made already
 * stays as it is. */
static void make_nodes(int modules, int devices) {
    int fd = openat(modules, "modules.devname", O_RDONLY | O_CLOEXEC);
    FILE *list = fd < 0 ? NULL : fdopen(fd, "r");
    char line[512], name[128], path[PATH_MAX], type;
    unsigned major_number, minor_number;
    while (list && fgets(line, sizeof line, list)) {
        if (sscanf(line, "%*s %127s %c%u:%u", name, &type, &major_number, &minor_number) != 4 ||
            (type != 'c' && type != 'b') || !normalise_name(name, path))
            continue;
        for (char *slash = path; (slash = strchr(slash, '/')); *slash++ = '/') {
            *slash = 0;
            mkdirat(devices, path, 0755);
        }
        mode_t mode = (type == 'c' ? S_IFCHR : S_IFBLK) | 0600;
        if (mknodat(devices, path, mode, makedev(major_number, minor_number)) < 0 && errno != EEXIST)
            console_print("cannot make /dev/%s: %s", name, strerror(errno));
    }
    if (list)
        fclose(list);
    else if (fd >= 0)
        close(fd);
}

/* Groups are those of the image: root's where it has none of that name. */
static void give_access(int devices) {
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
        const struct access_rule *rule = &rules[i];
        if (faccessat(devices, rule->name, F_OK, 0) < 0)
            continue;
        char user[64];
        struct account account;
        struct failure failure;
        snprintf(user, sizeof user, "0:%s", rule->group);
        gid_t group = *rule->group && account_find(user, &account, &failure) == 0 ? account.gid : 0;
        if (fchownat(devices, rule->name, 0, group, 0) < 0 || fchmodat(devices, rule->name, rule->mode, 0) < 0)
            console_print("cannot set the mode of /dev/%s: %s", rule->name, strerror(errno));
    }
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

/* The agent's own program under another name, mounted, so that it can be run however /dev and /run are mounted. It is
 * no path in /proc, for programs like iptables run this file by themselves, also in PID namespaces of their own. */
static void serve_requests(void) {
    close(open(MODPROBE, O_WRONLY | O_CREAT | O_CLOEXEC, 0755));
    if (mount("/proc/self/exe", MODPROBE, NULL, MS_BIND, NULL) < 0)
        console_print("the kernel's requests for modules are not served: cannot mount %s: %s", MODPROBE, strerror(errno));
    else
        write_setting(REQUESTS, MODPROBE);
}

void drivers_prepare(bool own_init) {
    int modules = modules_open(), devices = open("/dev", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (modules >= 0) {
        make_nodes(modules, devices);
        close(modules);
        serve_requests();
        if (own_init)
            mask_static_nodes();
    }
    give_access(devices);
    close(devices);
}
