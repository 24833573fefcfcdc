/* PID namespaces: pid_namespaces(7), setns(2). The agent itself stays in its own; only its children go elsewhere. */
#include "namespace.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct {
    pid_t first;      /* its PID 1 as the agent sees it; 0: there is none */
    int pids, mounts; /* descriptors of the namespaces; -1: it ended before they were opened */
} inner = {.pids = -1, .mounts = -1};

/* What the child that has just been forked is to do. */
static enum { ORDINARY, FIRST, JOINS } role;

bool namespace_there(void) { return inner.first > 0; }

static int open_namespace(const char *process, const char *kind) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/ns/%s", process, kind);
    return open(path, O_RDONLY | O_CLOEXEC);
}

static void close_descriptor(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static pid_t fork_first(struct failure *failure) {
    /* Without a stack the system call behaves as fork(2). */
    pid_t pid = (pid_t)syscall(SYS_clone, CLONE_NEWPID | CLONE_NEWNS | SIGCHLD, 0, 0, 0, 0);
    int error = errno;
    if (pid == 0)
        role = FIRST;
    if (pid > 0) {
        char process[16];
        snprintf(process, sizeof process, "%d", pid);
        inner.first = pid;
        inner.pids = open_namespace(process, "pid");
        inner.mounts = open_namespace(process, "mnt");
    }
    if (pid < 0)
        fail(failure, error, error == EINVAL ? "the guest's kernel has no PID namespaces (CONFIG_PID_NS), which a command "
                                               "that is PID 1 needs: --init agent does without"
                                             : "cannot make a process in a PID namespace: %s", strerror(error));
    return pid;
}

/* -1 when the namespace cannot be joined, since its PID 1 is ending. */
static pid_t fork_joining(void) {
    int own = open_namespace("self", "pid");
    pid_t pid = -1;
    if (own >= 0 && setns(inner.pids, CLONE_NEWPID) == 0) {
        pid = fork();
        if (pid == 0)
            role = JOINS;
        else
            setns(own, CLONE_NEWPID);
    }
    close_descriptor(&own);
    return pid;
}

pid_t namespace_fork(bool inside, struct failure *failure) {
    if (inside)
        return fork_first(failure);
    pid_t pid = inner.pids >= 0 && inner.mounts >= 0 ? fork_joining() : -1;
    if (pid < 0)
        pid = fork();
    if (pid < 0)
        fail(failure, errno, "cannot make a process: %s", strerror(errno));
    return pid;
}

int namespace_enter(struct failure *failure) {
    if (role == FIRST) {
        /* Mounts made later outside appear inside, and never the other way round; container engines inside share theirs. */
        if (mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0 || mount(NULL, "/", NULL, MS_REC | MS_SHARED, NULL) < 0 ||
            mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
            return fail(failure, errno, "cannot mount /proc for a PID namespace: %s", strerror(errno));
    } else if (role == JOINS && setns(inner.mounts, CLONE_NEWNS) < 0) {
        return fail(failure, errno, "cannot join the mounts of the main command: %s", strerror(errno));
    }
    return 0;
}

/* Not by setns(2): the kernel's own threads have the root of its PID 1, so that cannot change its mounts. */
int namespace_open(const char *path, int flags) {
    if (inner.first > 0) {
        char of_first[32];
        snprintf(of_first, sizeof of_first, "/proc/%d/root", inner.first);
        int root = open(of_first, O_PATH | O_DIRECTORY | O_CLOEXEC);
        struct open_how how = {.flags = (uint64_t)flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};
        int fd = (int)syscall(SYS_openat2, root, path, &how, sizeof how), error = errno;
        close_descriptor(&root);
        errno = error;
        if (fd >= 0 || error != ENOSYS) /* Linux before 5.6 */
            return fd;
    }
    return open(path, flags | O_CLOEXEC);
}

bool namespace_ended(pid_t pid) {
    if (pid != inner.first)
        return false;
    inner.first = 0;
    close_descriptor(&inner.pids);
    close_descriptor(&inner.mounts);
    return true;
}
