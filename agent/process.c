/* Children of the agent: commands and trees. */
#include "process.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "call.h"
#include "namespace.h"

enum { PIPE_SIZE = 1024 * 1024, REPORT_FD = 3, DESCRIPTOR_LIMIT = 65536 };

static struct {
    pid_t pid; /* while it runs */
    bool started, ended;
    uint32_t kind, value;
} main_command;

const struct plumbing plumbing_empty = {{-1, -1, -1}, -1, {-1, -1}};

int plumbing_pipe(int *read_end, int *write_end, bool agent_reads, struct failure *failure) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0)
        return fail(failure, errno, "cannot make a pipe: %s", strerror(errno));
    fcntl(ends[1], F_SETPIPE_SZ, PIPE_SIZE); /* a smaller one is only slower */
    fcntl(ends[agent_reads ? 0 : 1], F_SETFL, O_NONBLOCK);
    *read_end = ends[0];
    *write_end = ends[1];
    return 0;
}

static void close_descriptor(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

void plumbing_close(struct plumbing *plumbing) {
    for (int i = 0; i < 3; i++) {
        /* A terminal is all three of them. */
        if (i == 0 || plumbing->child[i] != plumbing->child[0])
            close_descriptor(&plumbing->child[i]);
    }
    plumbing->child[0] = plumbing->child[1] = plumbing->child[2] = -1;
    close_descriptor(&plumbing->input);
    close_descriptor(&plumbing->output[0]);
    close_descriptor(&plumbing->output[1]);
}

static void close_from(int first) {
#ifdef SYS_close_range
    if (syscall(SYS_close_range, first, ~0U, 0) == 0)
        return;
#endif
    struct rlimit limit = {0};
    getrlimit(RLIMIT_NOFILE, &limit);
    for (int fd = first; fd < DESCRIPTOR_LIMIT && (rlim_t)fd < limit.rlim_max; fd++)
        close(fd);
}

/* Puts the child's descriptors at 0 to 3. They are copied above 3 first, so that none is overwritten. */
static void arrange_descriptors(const struct plumbing *plumbing, int report) {
    int high[4];
    for (int i = 0; i < 3; i++)
        high[i] = fcntl(plumbing->child[i], F_DUPFD, REPORT_FD + 1);
    high[REPORT_FD] = fcntl(report, F_DUPFD, REPORT_FD + 1);
    for (int i = 0; i <= REPORT_FD; i++)
        dup3(high[i], i, i == REPORT_FD ? O_CLOEXEC : 0);
    close_from(REPORT_FD + 1);
}

static void reset_process(void) {
    for (int number = 1; number <= SIGRTMAX; number++)
        signal(number, SIG_DFL);
    umask(022);
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd >= 0) {
        if (write(fd, "0", 1) < 0)
            close_descriptor(&fd); /* an agent without privileges has nothing to undo */
        else
            close(fd);
    }
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur > 1024) {
        limit.rlim_cur = 1024; /* the usual soft limit, which select(2) needs; the agent raised its own */
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

_Noreturn static void child_begin(const struct plumbing *plumbing, int report, child_main *run, const void *context) {
    struct failure failure;
    memset(&failure, 0, sizeof failure);
    setsid();
    namespace_enter(&failure);
    arrange_descriptors(plumbing, report);
    reset_process();
    loop_signal_mask(false);
    if (failure.code == 0)
        run(context, &failure);
    /* Shorter than PIPE_BUF: written as a whole or not at all. */
    _exit(write(REPORT_FD, &failure, sizeof failure) == sizeof failure ? 127 : 126);
}

/* Hands the agent's ends over to the channel, which closes them. */
static bool attach(struct channel *channel, struct plumbing *plumbing) {
    bool done = true;
    if (plumbing->input >= 0)
        done = watch_open(&channel->input, plumbing->input) && done;
    for (int i = 0; i < 2; i++)
        if (plumbing->output[i] >= 0)
            done = channel_source(channel, i, plumbing->output[i]) && done;
    plumbing->input = plumbing->output[0] = plumbing->output[1] = -1;
    return done;
}

int process_spawn(struct channel *channel, struct plumbing *plumbing, child_main *run, const void *context,
                  struct failure *failure) {
    int report[2] = {-1, -1};
    if (pipe2(report, O_CLOEXEC) != 0 || fcntl(report[0], F_SETFL, O_NONBLOCK) != 0) {
        plumbing_close(plumbing);
        return fail(failure, errno, "cannot make a pipe: %s", strerror(errno));
    }
    if (!watch_open(&channel->report, report[0]) || !attach(channel, plumbing)) {
        close(report[1]);
        plumbing_close(plumbing);
        return fail(failure, ENOMEM, "cannot watch another descriptor");
    }
    pid_t pid = namespace_fork((channel->flags & EXEC_INIT) && !channel->tree, failure);
    if (pid == 0)
        child_begin(plumbing, report[1], run, context);
    close(report[1]);
    plumbing_close(plumbing);
    if (pid < 0)
        return failure->code;
    channel->pid = pid;
    return 0;
}

int process_report(struct watch *report, struct failure *failure) {
    if (report->fd < 0)
        return 0;
    if (!report->readable)
        return -1;
    ssize_t count = read(report->fd, failure, sizeof *failure);
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) {
        report->readable = errno == EINTR;
        return -1;
    }
    watch_close(report);
    if (count != sizeof *failure)
        return 0;
    failure->message[sizeof failure->message - 1] = 0;
    return 1;
}

void process_reap(void) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        uint32_t kind = WIFSIGNALED(status) ? 1 : 0;
        uint32_t value = (uint32_t)(kind == 1 ? WTERMSIG(status) : WEXITSTATUS(status));
        if (pid == main_command.pid && !main_command.ended) {
            main_command.ended = true;
            main_command.kind = kind;
            main_command.value = value;
        }
        /* reboot(2) in a PID namespace ends its PID 1 by these signals, which no other way does: reboot(2). */
        if (namespace_ended(pid) && kind == 1 && (value == SIGHUP || value == SIGINT) && boot_is_init())
            call_signal(value == SIGHUP ? SIGINT : SIGUSR2);
        struct channel *channel = channel_of_process(pid);
        if (channel != NULL)
            channel_exited(channel, kind, value);
    }
}

/* To the group, or to the process alone while it has not become the leader of one. */
static void signal_group(pid_t pid, int number) {
    if (kill(-pid, number) != 0 && errno == ESRCH)
        kill(pid, number);
}

void process_hangup(pid_t pid) {
    signal_group(pid, SIGHUP);
    signal_group(pid, SIGCONT); /* one that is stopped would never hear of it */
}

void process_signal(struct channel *channel, uint32_t number) {
    if (channel->pid <= 0 || channel->tree || channel->exited || number < 1 || number > (uint32_t)SIGRTMAX)
        return;
    pid_t foreground = channel->terminal ? tcgetpgrp(channel->sources[0].watch.fd) : -1;
    signal_group(foreground > 0 ? foreground : channel->pid, (int)number);
}

bool process_main_reserve(void) { return main_command.pid == 0 || main_command.ended; }

void process_main_spawned(pid_t pid) {
    memset(&main_command, 0, sizeof main_command);
    main_command.pid = pid;
}

void process_main_started(pid_t pid) {
    if (pid > 0 && pid == main_command.pid)
        main_command.started = true;
}

void process_main_failed(pid_t pid) {
    if (pid > 0 && pid == main_command.pid)
        memset(&main_command, 0, sizeof main_command);
}

pid_t process_main_pid(void) { return main_command.started && !main_command.ended ? main_command.pid : 0; }

bool process_main_ended(uint32_t *kind, uint32_t *value) {
    *kind = main_command.kind;
    *value = main_command.value;
    return main_command.started && main_command.ended;
}
