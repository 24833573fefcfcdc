/* Channels: streams between the host and a process or connection in the guest, with credit both ways. */
#ifndef BANGER_CHANNEL_H
#define BANGER_CHANNEL_H

#include "frame.h"
#include "loop.h"
#include "ring.h"

/* Where bytes for the host come from. */
struct source {
    struct watch watch;
    uint8_t stream;
    bool used;
    bool ended;  /* END was sent */
    size_t left; /* read at most so much more: after the end of a command what its processes left behind write is cut */
};

struct channel {
    uint32_t id; /* 0: the host does not know it (any more); what remains is a command whose output is logged */
    struct channel *next, **link;

    /* Called until it is true: then it has replied and set `open`, or has ended the channel. */
    bool (*start)(struct channel *channel);
    bool open;

    struct watch input; /* where bytes from the host go */
    struct ring queue;  /* those that `input` has not taken yet */
    bool input_ended;   /* END came */
    uint32_t may_receive, taken;

    struct source sources[2];
    uint64_t may_send;

    pid_t pid;      /* of a command or tree child, else 0 */
    uint64_t flags; /* enum exec_flags */
    bool terminal, tree, waits, dial;
    bool mid_line; /* terminal: the last byte from the host does not end a line */
    bool reset;    /* dial: reading has failed */
    bool exited;
    uint32_t exit_kind, exit_value;
    struct watch report; /* a struct failure comes from the child here, or nothing */
};

/* Makes a channel that is not open yet; NULL when there are too many. */
struct channel *channel_new(uint32_t id);
struct channel *channel_find(uint32_t id);
struct channel *channel_of_process(pid_t pid);
void channel_free(struct channel *channel);

void channel_frame(const struct frame *frame);
/* Sends REPLY and lets data flow. */
void channel_reply(struct channel *channel, const struct buffer *fields);
/* Sends ERROR and forgets the channel. */
void channel_fail(struct channel *channel, const struct failure *failure);
/* Makes `fd` the source of a stream. False (and `fd` closed) when that fails. */
bool channel_source(struct channel *channel, int index, int fd);
/* The process has ended: sources end with what is in them now. */
void channel_exited(struct channel *channel, uint32_t kind, uint32_t value);

/* channel_io.c: DATA and END from the host (false when they break the protocol), ... */
bool channel_receive(struct channel *channel, struct bytes payload);
bool channel_receive_end(struct channel *channel);
/* ... what was queued goes on, and grants go back; true when bytes were moved, ... */
bool channel_write(struct channel *channel);
/* ... at most one DATA frame of a source; true when bytes were moved, or it ended. */
bool channel_read(struct channel *channel, struct source *source);

/* One round over all channels, at most one DATA frame each; true when there may be more to do at once. */
bool channels_pump(void);
/* The host has gone: ends what is attached. */
void channels_hangup(void);

#endif
