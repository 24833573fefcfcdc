/* Moves the bytes of a channel between the session and its descriptors, within the credit of both sides. */
#include <errno.h>
#include <sys/socket.h>
#include <termios.h>
#include <unistd.h>

#include "channel.h"
#include "log.h"
#include "session.h"
#include "wire.h"

enum { GRANT = INITIAL_WINDOW / 4 };

/* Writes as much as the consumer takes now. One that is gone takes everything, so that the host is not held up. */
static size_t input_write(struct channel *channel, const struct iovec *parts, int count, size_t length) {
    while (channel->input.fd >= 0 && channel->input.writable) {
        ssize_t written = writev(channel->input.fd, parts, count);
        if (written >= 0)
            return (size_t)written;
        if (errno == EAGAIN)
            channel->input.writable = false;
        else if (errno != EINTR)
            watch_close(&channel->input);
    }
    return channel->input.fd >= 0 ? 0 : length;
}

/* False while the consumer is being made: then everything is queued. */
static bool flowing(const struct channel *channel) { return channel->open && channel->queue.length == 0; }

static void append_input(struct channel *channel, const uint8_t *data, size_t length) {
    struct failure failure;
    /* The window bounds the queue; two more bytes are for the end of input on a terminal. */
    if (length > 0 && !ring_append(&channel->queue, data, length, INITIAL_WINDOW + 2)) {
        fail(&failure, ENOMEM, "the guest is out of memory");
        channel_fail(channel, &failure);
    }
}

bool channel_receive(struct channel *channel, struct bytes payload) {
    if (payload.length > channel->may_receive || channel->input_ended)
        return false;
    if (payload.length == 0)
        return true;
    channel->may_receive -= (uint32_t)payload.length;
    uint8_t last = payload.data[payload.length - 1];
    channel->mid_line = last != '\n' && last != '\r';
    size_t taken = 0;
    if (flowing(channel)) {
        struct iovec part = {(void *)payload.data, payload.length};
        taken = input_write(channel, &part, 1, payload.length);
        channel->taken += (uint32_t)taken;
    }
    append_input(channel, payload.data + taken, payload.length - taken);
    return true;
}

/* A terminal has no end of input of its own: the EOF character (termios(3), VEOF) makes the reader's next read return
 * nothing, but in the middle of a line it takes two of them. */
bool channel_receive_end(struct channel *channel) {
    struct termios settings;
    if (channel->input_ended)
        return false;
    channel->input_ended = true;
    if (channel->terminal && channel->input.fd >= 0 && tcgetattr(channel->input.fd, &settings) == 0) {
        uint8_t eof[2] = {settings.c_cc[VEOF], settings.c_cc[VEOF]};
        append_input(channel, eof, channel->mid_line && (settings.c_lflag & ICANON) ? 2 : 1);
    }
    return true;
}

static void close_input(struct channel *channel) {
    if (channel->dial && channel->input.fd >= 0)
        shutdown(channel->input.fd, SHUT_WR);
    watch_close(&channel->input);
}

static void grant(struct channel *channel) {
    uint8_t payload[4];
    if (channel->taken < GRANT || channel->input_ended || channel->id == 0 || !session_room())
        return;
    put_u32(payload, channel->taken);
    session_send(FRAME_WINDOW, 0, channel->id, payload, sizeof payload);
    channel->may_receive += channel->taken;
    channel->taken = 0;
}

bool channel_write(struct channel *channel) {
    bool moved = false;
    while (channel->queue.length > 0) {
        struct iovec parts[2];
        ring_parts(&channel->queue, 0, channel->queue.length, parts);
        size_t taken = input_write(channel, parts, parts[1].iov_len > 0 ? 2 : 1, channel->queue.length);
        if (taken == 0)
            break;
        ring_consume(&channel->queue, taken);
        channel->taken += (uint32_t)taken;
        moved = true;
    }
    if (channel->input_ended && channel->queue.length == 0)
        close_input(channel);
    grant(channel);
    return moved;
}

static void advance(struct iovec parts[2], size_t length) {
    size_t first = length < parts[0].iov_len ? length : parts[0].iov_len;
    for (int i = 0; i < 2; i++) {
        size_t step = i == 0 ? first : length - first;
        parts[i].iov_base = (uint8_t *)parts[i].iov_base + step;
        parts[i].iov_len -= step;
    }
}

/* Reads until `limit` bytes are there or the source has no more now; `ended` when it never will. */
static size_t fill(struct channel *channel, struct source *source, struct iovec parts[2], size_t limit, bool *ended) {
    size_t length = 0;
    while (length < limit) {
        ssize_t count = readv(source->watch.fd, parts, 2);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0 && errno == EAGAIN) {
            source->watch.readable = false;
            *ended = source->left != SIZE_MAX;
            break;
        }
        /* A terminal that nobody has open says EIO, but the command may open it again, or be about to exit: closing
         * our side now would send it SIGHUP. */
        if (count < 0 && channel->terminal && !channel->exited) {
            source->watch.readable = false;
            break;
        }
        if (count <= 0) {
            *ended = true;
            channel->reset = count < 0 && channel->dial;
            break;
        }
        length += (size_t)count;
        advance(parts, (size_t)count);
    }
    return length;
}

static size_t smaller(uint64_t one, uint64_t other) { return (size_t)(one < other ? one : other); }

bool channel_read(struct channel *channel, struct source *source) {
    static uint8_t logged[MAX_PAYLOAD];
    bool attached = channel->id != 0, log = channel->flags & EXEC_LOG, ended = false;
    if (source->watch.fd < 0 || !source->watch.readable || (attached && channel->may_send == 0) || (log && !log_room()))
        return false;
    size_t limit = smaller(MAX_PAYLOAD, source->left);
    if (attached)
        limit = smaller(limit, channel->may_send);
    struct iovec parts[2] = {{logged, limit}, {logged, 0}};
    if (attached && !log)
        session_data_space(limit, parts);
    size_t length = fill(channel, source, parts, limit, &ended);
    if (length > 0 && log)
        log_record((uint8_t)(source->stream + 1), logged, length);
    if (length > 0 && attached && log)
        session_send(FRAME_DATA, source->stream, channel->id, logged, length);
    else if (length > 0 && attached)
        session_data_send(source->stream, channel->id, length);
    if (attached)
        channel->may_send -= length;
    if (source->left != SIZE_MAX)
        source->left -= length;
    if (ended || source->left == 0)
        watch_close(&source->watch);
    return length > 0 || source->watch.fd < 0;
}
