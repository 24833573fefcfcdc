/* The event loop: edge-triggered epoll that only notes what is ready; the work is done in rounds after it. */
#ifndef BANGER_LOOP_H
#define BANGER_LOOP_H

#include "agent.h"

/* A non-blocking descriptor. The flags stay set until whoever uses it clears them, on EAGAIN mostly. */
struct watch {
    int fd; /* -1: none */
    bool readable, writable;
    bool hangup;
    struct watch *next, **link;
};

void loop_open(void);
/* Watches `fd`, which now belongs to the watch. False (and `fd` closed) when epoll refuses it. */
bool watch_open(struct watch *watch, int fd);
void watch_close(struct watch *watch);
/* One round of work; then looks for events, and waits for them when there is nothing left to do. True when there may
 * be more to do at once. */
bool loop_round(bool wait);
_Noreturn void loop_run(void);

/* Signals that the agent takes from a descriptor; they are blocked. */
void loop_signal_mask(bool block);

#endif
