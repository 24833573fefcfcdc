/* Fuzzes the session: a host that says anything at all, to an agent whose streams are pipes instead of processes.
 *
 * The first byte of an input chooses: even, the rest is what the host says after a good HELLO; odd, it describes frames
 * (type, channel, stream, u16 length, then payload that repeats what follows), which get good checks, so that more than
 * the parser is reached. What the agent says must be whole frames, and no more DATA than was granted.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "../call.h"
#include "../log.h"
#include "../session.h"
#include "../wire.h"

int LLVMFuzzerInitialize(int *count, char ***arguments);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { IDS = 256, SENT_LIMIT = 4 * 1024 * 1024 };

/* The rest of the agent --------------------------------------------------------------------------------------- */

enum guest_state guest_state = STATE_RUNNING;

bool boot_wants_init(void) { return false; }
void boot_run_init(void) { abort(); }
bool boot_is_init(void) { return false; }
void boot_shutdown(uint64_t mode, uint64_t grace_ms) {
    (void)grace_ms;
    if (mode > 1)
        abort();
    guest_state = STATE_RUNNING;
}

/* Answers with what it was asked, if it is numbers and strings. */
static int echo(struct fields *request, struct buffer *reply, struct failure *failure) {
    uint16_t tag;
    struct bytes value;
    uint64_t number;
    while (fields_next(request, &tag, &value)) {
        char *text = value_string(value, 1000);
        if (value_number(value, &number))
            put_number(reply, tag, number);
        else if (text != NULL)
            put_string(reply, tag, text);
        else
            fail(failure, EINVAL, "field %u is neither", tag);
        free(text);
    }
    return failure->code;
}

int call_configure(struct fields *request, struct buffer *reply, struct failure *failure) {
    return echo(request, reply, failure);
}
int call_clock(struct fields *request, struct buffer *reply, struct failure *failure) {
    return echo(request, reply, failure);
}
int call_reseed(struct fields *request, struct buffer *reply, struct failure *failure) {
    return echo(request, reply, failure);
}
int call_stat(struct fields *request, struct buffer *reply, struct failure *failure) {
    return echo(request, reply, failure);
}
int call_stats(struct fields *request, struct buffer *reply, struct failure *failure) {
    return echo(request, reply, failure);
}
int call_ports(struct fields *request, struct buffer *reply, struct failure *failure) {
    return echo(request, reply, failure);
}
int call_processes(struct fields *request, struct buffer *reply, struct failure *failure) {
    return echo(request, reply, failure);
}
int call_grow(struct fields *request, struct buffer *reply, struct failure *failure) {
    return echo(request, reply, failure);
}

static void open_pipe(int ends[2]) {
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0)
        abort();
}

static bool start(struct channel *channel) {
    channel_reply(channel, &(struct buffer){0});
    return true;
}

/* What the host sends comes back; flags may have it logged as well. */
int exec_open(struct channel *channel, struct bytes request, struct failure *failure) {
    struct fields fields = {request, false};
    uint16_t tag;
    struct bytes value;
    int ends[2];
    while (fields_next(&fields, &tag, &value))
        if (tag == TAG_FLAGS && !value_number(value, &channel->flags))
            return fail(failure, EINVAL, "flags are a number");
    open_pipe(ends);
    channel->dial = true;
    channel->start = start;
    return watch_open(&channel->input, ends[1]) && channel_source(channel, 1, ends[0]) ? 0 : ENOMEM;
}

int dial_open(struct channel *channel, struct bytes request, struct failure *failure) {
    return exec_open(channel, request, failure);
}

/* Nobody reads what the host sends. */
int write_tree_open(struct channel *channel, struct bytes request, struct failure *failure) {
    int ends[2];
    (void)request;
    (void)failure;
    open_pipe(ends);
    close(ends[0]);
    channel->dial = true;
    channel_reply(channel, &(struct buffer){0});
    return watch_open(&channel->input, ends[1]) ? 0 : ENOMEM;
}

/* Two streams that end by themselves. */
int read_tree_open(struct channel *channel, struct bytes request, struct failure *failure) {
    int ends[2];
    (void)failure;
    channel->dial = true;
    channel_reply(channel, &(struct buffer){0});
    for (int i = 0; i < 2; i++) {
        open_pipe(ends);
        if (request.length > 0 && write(ends[1], request.data, request.length) < 0)
            abort();
        close(ends[1]);
        if (!channel_source(channel, i, ends[0]))
            return ENOMEM;
    }
    return 0;
}

/* The host ---------------------------------------------------------------------------------------------------- */

struct host {
    int fd;
    size_t sent;
    unsigned hellos;
    struct parser parser;
    int64_t credit[IDS]; /* what the agent may still send; channels are opened again and again, so never less */
    uint8_t *said;
    size_t said_length;
};

static struct host host;

static void check_frames(void) {
    struct frame frame;
    enum parsed parsed;
    while ((parsed = parser_next(&host.parser, &frame)) != PARSED_NOTHING) {
        /* A second HELLO may cut the answers to the first. */
        if (parsed == PARSED_BROKEN && host.hellos <= 1)
            abort();
        if (parsed != PARSED_FRAME || frame.type != FRAME_DATA || frame.channel >= IDS)
            continue;
        host.credit[frame.channel] -= (int64_t)frame.payload.length;
        if (host.credit[frame.channel] < 0 && host.hellos <= 1)
            abort();
    }
}

static void listen_to_agent(void) {
    for (;;) {
        struct bytes space = parser_space(&host.parser);
        ssize_t count = recv(host.fd, (uint8_t *)space.data, space.length, MSG_DONTWAIT);
        if (count <= 0)
            return;
        parser_filled(&host.parser, (size_t)count);
        check_frames();
    }
}

static void say(const uint8_t *data, size_t length) {
    while (length > 0 && host.sent < SENT_LIMIT) {
        ssize_t count = send(host.fd, data, length, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (count > 0) {
            data += count;
            length -= (size_t)count;
            host.sent += (size_t)count;
        }
        loop_round(false);
        listen_to_agent();
    }
}

static void say_frame(uint8_t type, uint8_t stream, uint32_t channel, const uint8_t *payload, uint32_t length) {
    uint8_t header[HEADER_SIZE];
    frame_header(header, type, stream, channel, length);
    host.hellos += type == FRAME_HELLO;
    if (channel < IDS && type == FRAME_OPEN)
        host.credit[channel] += INITIAL_WINDOW;
    if (channel < IDS && type == FRAME_WINDOW && length == 4)
        host.credit[channel] += get_u32(payload);
    say(header, sizeof header);
    say(payload, length);
    say(header + 12, TRAILER_SIZE);
}

static void say_hello(void) {
    uint8_t hello[HELLO_SIZE] = {1, 2, 3};
    hello[NONCE_SIZE] = hello[NONCE_SIZE + 2] = PROTOCOL_VERSION;
    say_frame(FRAME_HELLO, 0, 0, hello, sizeof hello);
}

static void say_described(const uint8_t *data, size_t size) {
    static uint8_t payload[MAX_PAYLOAD];
    while (size >= 6) {
        uint32_t length = get_u16(data + 3) % (MAX_PAYLOAD + 1), given = data[5];
        uint8_t type = data[0], channel = data[1], stream = data[2];
        data += 6;
        size -= 6;
        if (given > size)
            given = (uint32_t)size;
        for (uint32_t i = 0; i < length; i++)
            payload[i] = given > 0 ? data[i % given] : 0;
        data += given;
        size -= given;
        say_frame(type, stream, channel, payload, length);
    }
}

static struct sockaddr_un address = {.sun_family = AF_UNIX};
static socklen_t address_length;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0)
        return 0;
    host = (struct host){.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    if (host.fd < 0 || connect(host.fd, (struct sockaddr *)&address, address_length) != 0)
        abort();
    say_hello();
    if (data[0] & 1) {
        say_described(data + 1, size - 1);
    } else {
        host.hellos++;
        say(data + 1, size - 1);
    }
    while (loop_round(false))
        listen_to_agent();
    close(host.fd);
    /* The agent sees the end, and takes the next connection only after it. */
    while (loop_round(false))
        ;
    return 0;
}

static void write_seed(const char *directory, const char *name, const uint8_t *data, size_t length) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, data, length) != (ssize_t)length)
        abort();
    close(fd);
}

/* A session of each kind of stream, described, and a few raw bytes. */
static void write_seeds(const char *directory) {
    static const uint8_t streams[] = {OPEN_EXEC, OPEN_WRITE_TREE, OPEN_READ_TREE, OPEN_DIAL, OPEN_WAIT, CALL_HEALTH,
                                      CALL_STAT, CALL_SHUTDOWN, CALL_PROCESSES};
    for (size_t i = 0; i < sizeof streams; i++) {
        uint8_t seed[] = {
            1,
            FRAME_PART, 8, 0, 1, 0, 1, CALL_HEALTH,
            FRAME_OPEN, 8, 0, 1, 0, 0,
            FRAME_OPEN, 7, 0, 16, 0, 16, streams[i], 0,
            TAG_FLAGS, 0, 8, 0, 0, 0, i % 2 ? EXEC_LOG : 0, 0, 0, 0, 0, 0, 0, 0,
            FRAME_DATA, 7, 0, 0xec, 0xff, 2, 'a', 'b',
            FRAME_WINDOW, 7, 0, 4, 0, 4, 0, 0, 1, 0,
            FRAME_SIGNAL, 7, 0, 4, 0, 4, 1, 0, 0, 0,
            FRAME_RESIZE, 7, 0, 4, 0, 4, 24, 0, 80, 0,
            FRAME_END, 7, 0, 0, 0, 0,
            FRAME_CLOSE, 7, 0, 0, 0, 0,
        };
        char name[32];
        snprintf(name, sizeof name, "stream-%zu", i);
        write_seed(directory, name, seed, sizeof seed);
    }
    uint8_t raw[1 + HEADER_SIZE + 4 + TRAILER_SIZE] = {0};
    uint32_t check = frame_header(raw + 1, FRAME_OPEN, 0, 9, 4);
    put_u32(raw + 1 + HEADER_SIZE, CALL_HEALTH);
    put_u32(raw + 1 + HEADER_SIZE + 4, check);
    write_seed(directory, "raw", raw, sizeof raw);
}

int LLVMFuzzerInitialize(int *count, char ***arguments) {
    (void)count;
    (void)arguments;
    const char *seeds = getenv("BANGER_FUZZ_SEEDS");
    if (seeds != NULL)
        write_seeds(seeds);
    loop_open();
    log_use_path("/dev/null");
    /* A name in the abstract namespace leaves no file behind. */
    snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "banger-fuzz-%d", getpid());
    address_length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(address.sun_path + 1));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, address_length) != 0 || listen(fd, 1) != 0 ||
        !session_use_listener(fd, false))
        abort();
    return 0;
}
