/* The event loop of the agent. */
#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "call.h"
#include "channel.h"
#include "log.h"
#include "process.h"
#include "session.h"

enum { EVENTS = 64 };

static int epoll_fd = -1;
static struct watch *watches;
static struct watch signals = {.fd = -1};

static void signal_set(sigset_t *set) {
    static const int taken[] = {SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGPWR, SIGPIPE};
    sigemptyset(set);
    for (size_t i = 0; i < sizeof taken / sizeof taken[0]; i++)
        sigaddset(set, taken[i]);
}

void loop_signal_mask(bool block) {
    sigset_t set;
    if (block)
        signal_set(&set);
    else
        sigemptyset(&set);
    sigprocmask(SIG_SETMASK, &set, NULL);
}

static bool watch_register(struct watch *watch) {
    struct epoll_event event = {EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, {.ptr = watch}};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, watch->fd, &event) == 0)
        return true;
    /* A plain file (the log) never blocks, so epoll does not take it. */
    watch->readable = watch->writable = true;
    return errno == EPERM;
}

bool watch_open(struct watch *watch, int fd) {
    *watch = (struct watch){.fd = fd};
    if (!watch_register(watch)) {
        close(fd);
        watch->fd = -1;
        return false;
    }
    watch->next = watches;
    watch->link = &watches;
    if (watches != NULL)
        watches->link = &watch->next;
    watches = watch;
    return true;
}

void watch_close(struct watch *watch) {
    if (watch->fd < 0)
        return;
    /* Explicitly, since a child that has not yet called exec may still hold the descriptor. */
    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, watch->fd, NULL);
    close(watch->fd);
    *watch->link = watch->next;
    if (watch->next != NULL)
        watch->next->link = watch->link;
    *watch = (struct watch){.fd = -1};
}

static void signals_open(void) {
    sigset_t set;
    signal_set(&set);
    loop_signal_mask(true);
    int fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    if (fd < 0 || !watch_open(&signals, fd))
        abort();
}

void loop_open(void) {
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        abort();
    signals_open();
}

void loop_reopen(void) {
    /* A signalfd in an epoll tells of the signals of the process that put it there. */
    watch_close(&signals);
    close(epoll_fd);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        abort();
    for (struct watch *watch = watches; watch != NULL; watch = watch->next)
        watch_register(watch);
    signals_open();
}

static void signals_read(void) {
    struct signalfd_siginfo info;
    while (read(signals.fd, &info, sizeof info) == sizeof info)
        if (info.ssi_signo != SIGCHLD)
            call_signal((int)info.ssi_signo);
    signals.readable = false;
    process_reap();
}

static void wait_for_events(int timeout_ms) {
    struct epoll_event events[EVENTS];
    int count = epoll_wait(epoll_fd, events, EVENTS, timeout_ms);
    for (int i = 0; i < count; i++) {
        struct watch *watch = events[i].data.ptr;
        uint32_t happened = events[i].events;
        watch->readable |= (happened & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
        watch->writable |= (happened & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0;
        watch->hangup = (happened & EPOLLHUP) != 0;
    }
}

bool loop_round(bool wait) {
    bool progress = session_input();
    if (signals.readable)
        signals_read();
    progress |= channels_pump();
    progress |= session_output();
    log_pump();
    int timeout_ms = call_after_flush(progress), session_ms = session_timeout_ms();
    if (timeout_ms < 0 || (session_ms >= 0 && session_ms < timeout_ms))
        timeout_ms = session_ms;
    wait_for_events(progress || !wait ? 0 : timeout_ms);
    return progress;
}

void loop_run(void) {
    for (;;)
        loop_round(true);
}
