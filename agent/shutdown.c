/* Ends the guest: stops all processes, makes the disks clean, and powers off, or asks the image's init to do so. */
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "system.h"

/* Real-time signals by number, since the C libraries differ in what SIGRTMIN is: systemd(1) means 34. */
enum { SYSTEMD_POWER_OFF = 34 + 4, SYSTEMD_REBOOT = 34 + 5 };

/* Interactive shells ignore SIGTERM but end when their terminal hangs up. */
static void hang_up_terminals(void) {
    DIR *processes = opendir("/proc");
    if (!processes)
        return;
    struct dirent *entry;
    while ((entry = readdir(processes))) {
        struct process process;
        int pid = atoi(entry->d_name);
        if (pid > 1 && process_read(pid, &process) && process.tty)
            kill(pid, SIGHUP);
    }
    closedir(processes);
}

/* Reaps until this process (PID 1) has no child left, which means that no process is left; false when time is over. */
static bool reap_all(int64_t deadline) {
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, NULL);
    for (;;) {
        pid_t pid;
        while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
            ;
        if (pid < 0)
            return true;
        int64_t left = deadline - now_ms();
        if (left <= 0)
            return false;
        struct timespec timeout = {.tv_sec = left / 1000, .tv_nsec = left % 1000 * 1000000};
        sigtimedwait(&child, NULL, &timeout);
    }
}

static void end_processes(uint64_t grace_ms) {
    enum { LONGEST_GRACE_MS = 3600 * 1000, AFTER_KILL_MS = 2000 };
    kill(-1, SIGTERM);
    hang_up_terminals();
    kill(-1, SIGCONT);
    if (reap_all(now_ms() + (int64_t)(grace_ms < LONGEST_GRACE_MS ? grace_ms : LONGEST_GRACE_MS)))
        return;
    kill(-1, SIGKILL);
    reap_all(now_ms() + AFTER_KILL_MS); /* one that hangs in the kernel must not hold up the end */
}

static bool is_kernel_mount(const char *target) {
    static const char *const kept[] = {"/proc", "/sys", "/dev"};
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) {
        size_t length = strlen(kept[i]);
        if (strncmp(target, kept[i], length) == 0 && (target[length] == 0 || target[length] == '/'))
            return true;
    }
    return strcmp(target, "/") == 0;
}

/* Unmounts everything but the root and the kernel's filesystems, the latest first. */
static void unmount_all(void) {
    FILE *file = fopen("/proc/self/mountinfo", "re");
    if (!file)
        return;
    char **targets = NULL, *line = NULL;
    size_t count = 0, size = 0;
    while (getline(&line, &size, file) > 0) {
        struct mount mount;
        if (!parse_mount(line, &mount) || is_kernel_mount(mount.target))
            continue;
        char **more = realloc(targets, (count + 1) * sizeof *more);
        if (!more)
            break;
        targets = more;
        targets[count] = strdup(mount.target);
        count += targets[count] != NULL;
    }
    free(line);
    fclose(file);
    while (count > 0) {
        const char *target = targets[--count];
        if (umount2(target, UMOUNT_NOFOLLOW) < 0 && mount(NULL, target, NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0)
            umount2(target, MNT_DETACH | UMOUNT_NOFOLLOW);
        free(targets[count]);
    }
    free(targets);
}

static void end_guest(uint64_t mode) {
    sync();
    if (chdir("/") == 0)
        unmount_all();
    disks_freeze();
    sync();
    reboot(mode == 1 || boot_resets_only() ? RB_AUTOBOOT : RB_POWER_OFF);
}

/* The commands of sysvinit, OpenRC and others know how to reach their init. */
static bool run_command(const char *name) {
    static const char *const directories[] = {"/sbin", "/usr/sbin", "/bin", "/usr/bin"};
    for (size_t i = 0; i < sizeof directories / sizeof *directories; i++) {
        char path[64];
        snprintf(path, sizeof path, "%s/%s", directories[i], name);
        if (access(path, X_OK) < 0)
            continue;
        pid_t child = fork();
        if (child == 0) {
            sigset_t none;
            sigemptyset(&none);
            sigprocmask(SIG_SETMASK, &none, NULL);
            char *arguments[] = {path, NULL};
            char *environment[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", NULL};
            execve(path, arguments, environment);
            _exit(127);
        }
        return child > 0;
    }
    return false;
}

/* False when nothing is known that this init would understand. */
static bool ask_init(uint64_t mode) {
    char path[256];
    ssize_t length = readlink("/proc/1/exe", path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    bool reboots = mode == 1;
    if (strcmp(name, "systemd") == 0)
        return kill(1, reboots ? SYSTEMD_REBOOT : SYSTEMD_POWER_OFF) == 0;
    if (strncmp(name, "busybox", 7) == 0)
        return kill(1, reboots ? SIGTERM : SIGUSR2) == 0;
    return run_command(reboots ? "reboot" : "poweroff");
}

void boot_shutdown(uint64_t mode, uint64_t grace_ms) {
    if (!boot_in_guest())
        return;
    guest_state = STATE_STOPPING;
    if (mode == 0 && boot_resets_only())
        console_print("%s", POWER_OFF_NOTICE); /* the host sees a reset, and here which of both it means */
    if (boot_is_init())
        end_processes(grace_ms);
    else if (ask_init(boot_resets_only() ? 1 : mode))
        return;
    end_guest(mode);
}
