/* The table of channels: their frames, their credit, their beginning and end. */
#include "channel.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#include "process.h"
#include "session.h"
#include "wire.h"

enum { TERMINAL_BACKLOG = 64 * 1024 }; /* more than a pty can hold */

static struct channel *channels;
static size_t channel_count;

struct channel *channel_new(uint32_t id) {
    struct channel *channel = channel_count < MAX_CHANNELS ? calloc(1, sizeof *channel) : NULL;
    if (channel == NULL)
        return NULL;
    channel->id = id;
    channel->input.fd = channel->report.fd = -1;
    channel->sources[0].watch.fd = channel->sources[1].watch.fd = -1;
    channel->may_receive = INITIAL_WINDOW;
    channel->may_send = INITIAL_WINDOW;
    channel->next = channels;
    channel->link = &channels;
    if (channels != NULL)
        channels->link = &channel->next;
    channels = channel;
    channel_count++;
    return channel;
}

struct channel *channel_find(uint32_t id) {
    struct channel *channel = channels;
    while (channel != NULL && channel->id != id)
        channel = channel->next;
    return channel;
}

struct channel *channel_of_process(pid_t pid) {
    struct channel *channel = channels;
    while (channel != NULL && (channel->pid != pid || channel->exited))
        channel = channel->next;
    return channel;
}

void channel_free(struct channel *channel) {
    watch_close(&channel->input);
    watch_close(&channel->report);
    watch_close(&channel->sources[0].watch);
    watch_close(&channel->sources[1].watch);
    free(channel->queue.data);
    *channel->link = channel->next;
    if (channel->next != NULL)
        channel->next->link = channel->link;
    channel_count--;
    free(channel);
}

bool channel_source(struct channel *channel, int index, int fd) {
    struct source *source = &channel->sources[index];
    source->stream = (uint8_t)index;
    source->used = true;
    source->left = SIZE_MAX;
    return watch_open(&source->watch, fd);
}

/* The host knows the channel no longer: an attached command is hung up, a detached or logged one goes on. */
static void channel_detach(struct channel *channel) {
    channel->id = 0;
    watch_close(&channel->input);
    if (channel->pid > 0 && !channel->exited && !(channel->flags & EXEC_DETACHED))
        process_hangup(channel->pid);
    if (!channel->open)
        process_main_started(channel->pid);
    if (!(channel->flags & EXEC_LOG))
        channel_free(channel);
}

void channel_exited(struct channel *channel, uint32_t kind, uint32_t value) {
    channel->exited = true;
    channel->exit_kind = kind;
    channel->exit_value = value;
    channel->report.readable = true;
    watch_close(&channel->input);
    for (int i = 0; i < 2; i++) {
        struct source *source = &channel->sources[i];
        int waiting = 0;
        source->watch.readable = true;
        /* What only the log gets goes on to the real end. */
        if (source->watch.fd < 0 || channel->id == 0)
            continue;
        /* A terminal moves its bytes along in the background: it has sent all when it says EAGAIN. */
        ioctl(source->watch.fd, FIONREAD, &waiting);
        source->left = channel->terminal ? TERMINAL_BACKLOG : (size_t)waiting;
    }
}

void channels_hangup(void) {
    for (struct channel *channel = channels, *next; channel != NULL; channel = next) {
        next = channel->next;
        if (channel->id != 0)
            channel_detach(channel);
    }
}

void channel_reply(struct channel *channel, const struct buffer *fields) {
    channel->open = true;
    if (channel->id != 0)
        session_send(FRAME_REPLY, 0, channel->id, fields->data, fields->length);
}

void channel_fail(struct channel *channel, const struct failure *failure) {
    if (channel->id != 0)
        session_send_error(channel->id, failure);
    channel_free(channel);
}

static void add_credit(struct channel *channel, uint32_t more) {
    channel->may_send += more;
    if (channel->may_send > UINT32_MAX)
        channel->may_send = UINT32_MAX;
}

static void resize(struct channel *channel, uint16_t rows, uint16_t columns) {
    struct winsize size = {.ws_row = rows, .ws_col = columns};
    if (channel->terminal && channel->sources[0].watch.fd >= 0)
        ioctl(channel->sources[0].watch.fd, TIOCSWINSZ, &size);
}

/* A frame of an open channel; false when it breaks the protocol. */
static bool dispatch(struct channel *channel, const struct frame *frame) {
    struct bytes payload = frame->payload;
    switch (frame->type) {
    case FRAME_DATA:
        return frame->stream == STREAM_MAIN && channel_receive(channel, payload);
    case FRAME_END:
        return frame->stream == STREAM_MAIN && payload.length == 0 && channel_receive_end(channel);
    case FRAME_WINDOW:
        if (payload.length != 4)
            return false;
        add_credit(channel, get_u32(payload.data));
        return true;
    case FRAME_SIGNAL:
        if (payload.length != 4)
            return false;
        process_signal(channel, get_u32(payload.data));
        return true;
    case FRAME_RESIZE:
        if (payload.length != 4)
            return false;
        resize(channel, get_u16(payload.data), get_u16(payload.data + 2));
        return true;
    case FRAME_CLOSE:
        session_send(FRAME_CLOSE, 0, channel->id, NULL, 0);
        channel_detach(channel);
        return payload.length == 0;
    case FRAME_ERROR:
        channel_detach(channel);
        return payload.length >= 4;
    default:
        return false;
    }
}

void channel_frame(const struct frame *frame) {
    struct channel *channel = channel_find(frame->channel);
    if (channel != NULL && !dispatch(channel, frame))
        session_violation();
}

static void send_exit(struct channel *channel) {
    uint8_t payload[8];
    put_u32(payload, channel->exit_kind);
    put_u32(payload + 4, channel->exit_value);
    session_send(FRAME_EXIT, 0, channel->id, payload, sizeof payload);
}

/* END for every source that has run dry; true when none is left. That of a tree waits for the child's verdict, so that
 * a host never takes a broken tar stream for a whole one. */
static bool send_ends(struct channel *channel) {
    bool all = true;
    for (int i = 0; i < 2; i++) {
        struct source *source = &channel->sources[i];
        if (!source->used || source->ended)
            continue;
        if (source->watch.fd < 0 && session_room() && (!channel->tree || channel->exited)) {
            session_send(FRAME_END, source->stream, channel->id, NULL, 0);
            source->ended = true;
        }
        all = all && source->ended;
    }
    return all;
}

/* True when neither side of the channel has anything left to do. */
static bool finished(struct channel *channel) {
    if (!send_ends(channel))
        return false;
    if (channel->waits)
        return process_main_ended(&channel->exit_kind, &channel->exit_value);
    return channel->dial ? channel->input.fd < 0 : channel->exited;
}

/* Ends the channel once nothing more can come. */
static void finish(struct channel *channel) {
    if (channel->id == 0) {
        if (channel->sources[0].watch.fd < 0 && channel->sources[1].watch.fd < 0)
            channel_free(channel);
    } else if (finished(channel) && session_room()) {
        if (!channel->dial)
            send_exit(channel);
        session_send(FRAME_CLOSE, 0, channel->id, NULL, 0);
        channel_free(channel);
    }
}

/* True when the child of a tree, or the connection of a dial, has failed; the channel is then gone. */
static bool failed(struct channel *channel) {
    struct failure failure;
    if (channel->reset)
        fail(&failure, ECONNRESET, "the connection was reset");
    else if (!channel->tree || !channel->exited || process_report(&channel->report, &failure) <= 0)
        return false;
    channel_fail(channel, &failure);
    return true;
}

/* All but DATA for the host; true when bytes were moved. */
static bool pump(struct channel *channel) {
    bool moved = false;
    if (!channel->open)
        return session_room() && channel->start(channel);
    if (session_room() && failed(channel))
        return false;
    moved = channel_write(channel);
    for (int i = 0; i < 2 && channel->id == 0; i++)
        moved |= channel_read(channel, &channel->sources[i]);
    finish(channel);
    return moved;
}

static void move_to_end(struct channel *channel) {
    struct channel **end = channel->link;
    *channel->link = channel->next;
    if (channel->next != NULL)
        channel->next->link = channel->link;
    while (*end != NULL)
        end = &(*end)->next;
    *end = channel;
    channel->link = end;
    channel->next = NULL;
}

bool channels_pump(void) {
    bool moved = false;
    for (struct channel *channel = channels, *next; channel != NULL; channel = next) {
        next = channel->next;
        moved |= pump(channel);
    }
    /* Round robin: where the room ends, the next round begins. */
    for (size_t count = channel_count; count > 0 && session_bulk_room(); count--) {
        struct channel *channel = channels;
        move_to_end(channel);
        for (int i = 0; i < 2 && channel->open && channel->id != 0 && session_bulk_room(); i++)
            moved |= channel_read(channel, &channel->sources[i]);
    }
    return moved;
}
