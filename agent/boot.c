/* The agent as /init of the boot archive: kernel filesystems, modules, ports, and the hand-over to the image's init. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "init.h"
#include "system.h"

/* The kernel's own hard limit of 4096 is too low for databases; these are the limits of systemd (systemd.exec(5)). */
enum { USUAL_DESCRIPTORS = 1024, MAX_DESCRIPTORS = 524288 };

static bool in_guest, resets_only;
/* What becomes PID 1; NULL: the agent stays it. */
static const char *chosen_init, *init_directory;
static char **init_words;

static void console_print_list(const char *format, va_list arguments) {
    char line[600] = "banger: ";
    size_t used = strlen(line);
    int length = vsnprintf(line + used, sizeof line - used - 1, format, arguments);
    if (length < 0)
        return;
    used = used + (size_t)length < sizeof line - 2 ? used + (size_t)length : sizeof line - 2;
    line[used] = '\n';
    /* Opened each time: the image's init may have hung up what was open before. */
    int console = open("/dev/console", O_WRONLY | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
    ssize_t written = write(console >= 0 ? console : STDERR_FILENO, line, used + 1);
    (void)written;
    if (console >= 0)
        close(console);
}

void console_print(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    console_print_list(format, arguments);
    va_end(arguments);
}

/* There is nobody to report to: says it on the console and ends the guest. */
static _Noreturn __attribute__((format(printf, 1, 2))) void fatal(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    console_print_list(format, arguments);
    va_end(arguments);
    sync();
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

bool boot_in_guest(void) {
    return in_guest;
}

bool boot_is_init(void) {
    return getpid() == 1;
}

static void mount_kernel(const char *type, const char *target, unsigned long flags, const char *options) {
    mkdir(target, 0755);
    if (mount(type, target, type, flags, options) < 0 && errno != EBUSY)
        fatal("cannot mount %s on %s: %s", type, target, strerror(errno));
}

static void open_console(void) {
    int console = open("/dev/console", O_RDWR | O_NOCTTY);
    if (console < 0)
        console = open("/dev/null", O_RDWR);
    for (int fd = 0; console >= 0 && fd <= 2; fd++)
        if (fd != console)
            dup2(console, fd);
    if (console > 2)
        close(console);
}

static void load_module(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
        console_print("cannot load the kernel module %s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    unlink(path); /* the boot archive lies in memory */
}

static void load_modules(void) {
    FILE *order = fopen("/modules/order", "re");
    if (!order)
        return; /* a kernel with everything built in */
    char *line = NULL;
    size_t size = 0;
    while (getline(&line, &size, order) > 0) {
        line[strcspn(line, "\n")] = 0;
        if (*line)
            load_module(line);
    }
    free(line);
    fclose(order);
    unlink("/modules/order");
    rmdir("/modules");
}

void boot_prepare(void) {
    in_guest = true;
    umask(022);
    mount_kernel("devtmpfs", "/dev", MS_NOSUID | MS_STRICTATIME, "mode=0755");
    open_console();
    mount_kernel("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_kernel("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    reboot(RB_DISABLE_CAD); /* Ctrl-Alt-Del becomes SIGINT to this process */
    setrlimit(RLIMIT_NOFILE, &(struct rlimit){MAX_DESCRIPTORS, MAX_DESCRIPTORS});
    load_modules();
}

bool device_wait(bool (*found)(void *context), void *context, int wait_ms) {
    int64_t deadline = now_ms() + wait_ms;
    int events = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
    struct sockaddr_nl group = {.nl_family = AF_NETLINK, .nl_groups = 1};
    if (events >= 0)
        bind(events, (struct sockaddr *)&group, sizeof group);
    bool result;
    while (!(result = found(context))) {
        int64_t left = deadline - now_ms();
        if (left <= 0)
            break;
        struct pollfd poll_events = {.fd = events, .events = POLLIN};
        poll(&poll_events, 1, left < 1000 ? (int)left : 1000); /* looks again even when no event came */
        char event[4096];
        while (recv(events, event, sizeof event, 0) > 0)
            ;
    }
    if (events >= 0)
        close(events);
    return result;
}

struct way {
    int fd;
    bool listens;
};

int boot_open_port(const char *wanted) {
    int fd = -1;
    DIR *ports = opendir("/sys/class/virtio-ports");
    if (!ports)
        return -1;
    struct dirent *entry;
    while (fd < 0 && (entry = readdir(ports))) {
        char path[300], name[64];
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        if (!read_line(path, name, sizeof name) || strcmp(name, wanted) != 0)
            continue;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    }
    closedir(ports);
    return fd;
}

static bool way_open(void *context) {
    struct way *way = context;
    way->fd = boot_open_port(AGENT_PORT);
    if (way->fd < 0 && vsock_present()) {
        way->fd = vsock_listen(VSOCK_AGENT_PORT);
        way->listens = resets_only = way->fd >= 0;
    }
    return way->fd >= 0;
}

int boot_open_way(int wait_ms, bool *listens) {
    struct way way = {.fd = -1};
    device_wait(way_open, &way, wait_ms);
    *listens = way.listens;
    return way.fd;
}

bool boot_resets_only(void) {
    return resets_only;
}

const char *boot_path(void) {
    for (char **variable = configured_environment; *variable != NULL; variable++)
        if (strncmp(*variable, "PATH=", 5) == 0)
            return *variable + 5;
    return USUAL_PATH;
}

int boot_choose_init(char **words, const char *directory, struct failure *failure) {
    static char found[PATH_MAX];
    if (words != NULL && words[0] != NULL) {
        if (!program_find(words[0], directory, boot_path(), found))
            return fail(failure, ENOENT, "the image has no '%.200s' that could be its init", words[0]);
        chosen_init = found;
        init_words = words;
        init_directory = directory;
        return 0;
    }
    static const char *const candidates[] = {"/sbin/init",           "/usr/sbin/init",
                                             "/usr/local/sbin/init", "/lib/systemd/systemd",
                                             "/usr/lib/systemd/systemd", "/bin/systemd",
                                             "/usr/bin/systemd",     "/bin/init"};
    for (size_t i = 0; i < sizeof candidates / sizeof *candidates; i++) {
        struct stat status;
        if (stat(candidates[i], &status) == 0 && S_ISREG(status.st_mode) && access(candidates[i], X_OK) == 0) {
            chosen_init = candidates[i];
            return 0;
        }
    }
    return fail(failure, ENOENT, "the image has no init (/sbin/init, /lib/systemd/systemd or /bin/init)");
}

bool boot_wants_init(void) {
    return boot_is_init() && chosen_init;
}

/* What the kernel gives an init, and above it what configure gave. Not `container`, with which images tell an init that it
 * is in a container: systemd would end there instead of powering off. */
static char **init_environment(void) {
    static char *usual[] = {("PATH=" USUAL_PATH), "HOME=/", "TERM=linux"};
    size_t usual_count = sizeof usual / sizeof *usual, given = 0, count = 0;
    while (configured_environment[given] != NULL)
        given++;
    char **environment = calloc(usual_count + given + 1, sizeof *environment);
    if (environment == NULL)
        fatal("no memory for the environment of %s", chosen_init);
    for (size_t i = 0; i < usual_count; i++) {
        size_t name = strcspn(usual[i], "=") + 1, same = 0;
        while (same < given && strncmp(configured_environment[same], usual[i], name) != 0)
            same++;
        if (same == given)
            environment[count++] = usual[i];
    }
    for (size_t i = 0; i < given; i++)
        if (strncmp(configured_environment[i], "container=", 10) != 0)
            environment[count++] = configured_environment[i];
    return environment;
}

static _Noreturn void execute_init(void) {
    sigset_t none;
    sigemptyset(&none);
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    /* The agent's own settings are not for the image's init, which hands its own on to its services. */
    write_setting("/proc/self/oom_score_adj", "0");
    setrlimit(RLIMIT_NOFILE, &(struct rlimit){USUAL_DESCRIPTORS, MAX_DESCRIPTORS});
    char *arguments[] = {(char *)chosen_init, NULL};
    if (init_directory != NULL && chdir(init_directory) < 0)
        console_print("cannot enter %s: %s", init_directory, strerror(errno));
    execve(chosen_init, init_words != NULL ? init_words : arguments, init_environment());
    fatal("cannot execute %s: %s", chosen_init, strerror(errno));
}

/* systemd's last sweep spares processes whose argv[0] begins with '@' (systemd's documentation: "Storage Daemons for
 * the Root File System"). Where argv lies is field 48 of /proc/self/stat (proc(5)). */
static void mark_argv(void) {
    char line[1024];
    if (!read_line("/proc/self/stat", line, sizeof line))
        return;
    const char *field = strrchr(line, ')');
    for (int number = 2; field && number < 48; number++)
        field = strchr(field + 1, ' ');
    char *argv = field ? (char *)strtoul(field, NULL, 10) : NULL;
    if (argv)
        *argv = '@';
}

void boot_run_init(void) {
    pid_t child = fork();
    if (child < 0)
        fatal("cannot start the image's init: %s", strerror(errno));
    if (child > 0)
        execute_init();
    setsid();
    mark_argv();
    prctl(PR_SET_NAME, "banger-agent", 0, 0, 0);
}
