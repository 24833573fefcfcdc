/* What the host asks for: dispatch of OPEN, and what is done once its answer has been sent. */
#ifndef BANGER_CALL_H
#define BANGER_CALL_H

#include "channel.h"

/* The payload of OPEN: u16 kind, fields. */
void call_open(uint32_t id, struct bytes payload);
/* Shutdown and the change of init wait until the replies to them are written, and shutdown for the main command when
 * that was told to end; `moved`: this round moved data. Returns how many ms the loop may sleep, -1 for no limit. */
int call_after_flush(bool moved);
/* An ordinary process ends on shutdown and on signals; otherwise this is a guest. */
void call_setup(bool ordinary_process);
/* A signal to the agent itself: as PID 1 those of busybox's init and of Ctrl-Alt-Del take the guest down. */
void call_signal(int number);

/* Begins a stream: sets up the channel and its `start`, or replies at once; else returns the errno in `failure`. */
typedef int stream_handler(struct channel *channel, struct bytes request, struct failure *failure);

stream_handler exec_open, write_tree_open, read_tree_open, dial_open;

#endif
