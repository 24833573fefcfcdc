/* The connection to the host. */
#include "session.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "call.h"
#include "channel.h"
#include "loop.h"
#include "request.h"
#include "ring.h"
#include "system.h"
#include "wire.h"

enum {
    OUTPUT_CAPACITY = 512 * 1024,
    BULK_LIMIT = OUTPUT_CAPACITY / 2,
    GONE_MS = 1000,
    CONTROL_ROOM = 2 * MAX_FRAME, /* one frame as the answer to what is being handled, one for everything else */
};

static struct watch port = {.fd = -1}, listener = {.fd = -1};
static struct parser parser;
static uint8_t output_data[OUTPUT_CAPACITY];
static struct ring output = {output_data, OUTPUT_CAPACITY, 0, 0};
static bool violated, host_only;
static uint16_t version; /* of the protocol, in this session */
static int64_t gone_ms; /* when the host will be taken for gone; 0: it is there */

bool session_use_port(int fd) { return watch_open(&port, fd); }

bool session_use_listener(int fd, bool from_host_only) {
    host_only = from_host_only;
    return watch_open(&listener, fd);
}

bool session_pending(void) { return output.length > 0; }

bool session_room(void) { return output.capacity - output.length >= CONTROL_ROOM; }

bool session_bulk_room(void) { return output.length <= BULK_LIMIT; }

void session_violation(void) { violated = true; }

/* Forgets the session; queued output is dropped, even half a frame: the next host discards all until its own HELLO. */
static void session_end(void) {
    output.start = output.length = 0;
    parser.synced = false;
    violated = false;
    request_forget();
    channels_hangup();
}

void session_data_space(size_t length, struct iovec parts[2]) {
    ring_parts(&output, output.length + HEADER_SIZE, length, parts);
}

void session_data_send(uint8_t stream, uint32_t channel, size_t length) {
    uint8_t header[HEADER_SIZE];
    frame_header(header, FRAME_DATA, stream, channel, (uint32_t)length);
    ring_put(&output, output.length, header, sizeof header);
    ring_put(&output, output.length + HEADER_SIZE + length, header + 12, TRAILER_SIZE);
    output.length += HEADER_SIZE + length + TRAILER_SIZE;
}

void session_send(uint8_t type, uint8_t stream, uint32_t channel, const void *payload, size_t length) {
    uint8_t header[HEADER_SIZE];
    frame_header(header, type, stream, channel, (uint32_t)length);
    ring_put(&output, output.length, header, sizeof header);
    ring_put(&output, output.length + HEADER_SIZE, payload, length);
    ring_put(&output, output.length + HEADER_SIZE + length, header + 12, TRAILER_SIZE);
    output.length += HEADER_SIZE + length + TRAILER_SIZE;
}

void session_send_error(uint32_t channel, const struct failure *failure) {
    uint8_t payload[4 + sizeof failure->message];
    size_t length = strnlen(failure->message, sizeof failure->message);
    put_u32(payload, (uint32_t)failure->code);
    memcpy(payload + 4, failure->message, length);
    session_send(FRAME_ERROR, 0, channel, payload, 4 + length);
}

/* HELLO at any time ends the earlier session and begins a new one. */
static void hello(struct bytes payload) {
    uint8_t reply[HELLO_SIZE] = {0};
    uint16_t oldest = get_u16(payload.data + NONCE_SIZE), newest = get_u16(payload.data + NONCE_SIZE + 2);
    session_end();
    version = newest < PROTOCOL_VERSION ? newest : PROTOCOL_VERSION;
    parser.synced = version >= OLDEST_VERSION && version >= oldest;
    memcpy(reply, payload.data, NONCE_SIZE);
    if (parser.synced) {
        put_u16(reply + NONCE_SIZE, version);
        put_u16(reply + NONCE_SIZE + 2, version);
    }
    session_send(FRAME_HELLO, 0, 0, reply, sizeof reply);
}

static void handle_frame(const struct frame *frame) {
    if (frame->type == FRAME_HELLO && frame->payload.length == HELLO_SIZE)
        hello(frame->payload);
    else if (frame->type == FRAME_HELLO || frame->channel == 0)
        violated = true;
    else if (frame->type == FRAME_PART)
        violated = version < 2 || !request_part(frame->channel, frame->payload);
    else if (frame->type == FRAME_OPEN)
        call_open(frame->channel, frame->payload);
    else
        channel_frame(frame);
    if (violated)
        session_end();
}

static void handle_frames(void) {
    struct frame frame;
    enum parsed parsed = PARSED_FRAME;
    while (session_room() && parsed != PARSED_NOTHING) {
        parsed = parser_next(&parser, &frame);
        if (parsed == PARSED_FRAME)
            handle_frame(&frame);
        else if (parsed == PARSED_BROKEN)
            session_end();
    }
}

/* The host has gone. A port stays open for the next one: no more reading before epoll tells of it. */
static void hangup(void) {
    session_end();
    parser.start = parser.end = 0;
    port.readable = port.hangup = false;
    gone_ms = 0;
    if (listener.fd >= 0)
        watch_close(&port);
}

/* A virtio-serial port says that nobody is there (POLLHUP, reads of 0) until a worker of the kernel has handled the
 * message about the new host, whose first bytes, its HELLO among them, may have been read long before. So the session
 * ends only when the port has said so for a while. */
static bool host_gone(void) {
    if (!port.hangup)
        gone_ms = 0;
    else if (gone_ms == 0)
        gone_ms = now_ms() + GONE_MS;
    if (gone_ms == 0 || now_ms() < gone_ms)
        return false;
    struct pollfd poller = {.fd = port.fd, .events = POLLIN};
    port.hangup = poll(&poller, 1, 0) > 0 && (poller.revents & POLLHUP);
    return port.hangup;
}

int session_timeout_ms(void) {
    int64_t now = now_ms();
    return gone_ms == 0 ? -1 : gone_ms > now ? (int)(gone_ms - now) : 0;
}

static void accept_host(void) {
    int fd = accept4(listener.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0 && host_only && !vsock_from_host(fd))
        close(fd);
    else if (fd >= 0)
        watch_open(&port, fd);
    else if (errno == EAGAIN)
        listener.readable = false;
}

bool session_input(void) {
    if (listener.readable && port.fd < 0)
        accept_host();
    if (host_gone()) {
        hangup();
        return true;
    }
    handle_frames();
    if (!port.readable || !session_room())
        return false;
    struct bytes space = parser_space(&parser);
    size_t filled = 0;
    bool ended = false;
    /* A virtio-serial port gives one page at a time. */
    while (filled < space.length) {
        ssize_t count = read(port.fd, (uint8_t *)space.data + filled, space.length - filled);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0 && errno == EAGAIN) {
            port.readable = false;
            break;
        }
        if (count <= 0) {
            port.readable = false;
            port.hangup = ended = true;
            break;
        }
        filled += (size_t)count;
    }
    parser_filled(&parser, filled);
    handle_frames();
    /* A socket has one host only. What it said before it closed has been done, for it may have closed on purpose. */
    if (ended && listener.fd >= 0)
        hangup();
    return port.readable || ended;
}

bool session_output(void) {
    bool written = false;
    while (output.length > 0 && port.fd >= 0 && port.writable) {
        struct iovec parts[2];
        ring_parts(&output, 0, output.length, parts);
        ssize_t count = writev(port.fd, parts, parts[1].iov_len > 0 ? 2 : 1);
        if (count > 0) {
            ring_consume(&output, (size_t)count);
            written = true;
            continue;
        }
        if (count < 0 && errno == EINTR)
            continue;
        port.writable = false;
        if (count < 0 && errno != EAGAIN && listener.fd >= 0)
            hangup();
    }
    return written;
}
