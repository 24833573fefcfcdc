/* Dispatch of OPEN to the parts of the agent, and the calls that concern the agent itself. */
#include "call.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "log.h"
#include "process.h"
#include "request.h"
#include "session.h"
#include "wire.h"

enum { GUEST_ID = 1u << 31, DEFAULT_GRACE_MS = 5000, FLUSH_MS = 2000 };
enum { LAST_SIGNAL = 64, LONGEST_GRACE_MS = 24 * 3600 * 1000, DRAIN_MS = 500 };

static bool standalone, shutdown_wanted, init_changed;
/* Times of the monotonic clock: the main command may run until main_end_ms (0: it got no signal of its own), what is
 * queued may leave until flush_end_ms, processes are killed at grace_end_ms. */
static uint64_t shutdown_mode, main_end_ms, flush_end_ms, grace_end_ms;

void call_setup(bool ordinary_process) { standalone = ordinary_process; }

static uint64_t now_ms(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void put_boot_id(struct buffer *reply) {
    char text[64];
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t count = fd >= 0 ? read(fd, text, sizeof text) : 0;
    if (fd >= 0)
        close(fd);
    while (count > 0 && text[count - 1] == '\n')
        count--;
    if (count > 0)
        put_bytes(reply, TAG_BOOT_ID, text, (size_t)count);
}

static int call_health(struct fields *request, struct buffer *reply, struct failure *failure) {
    struct utsname name;
    uint32_t kind, value;
    (void)request;
    (void)failure;
    put_number(reply, TAG_STATE, (uint64_t)guest_state);
    put_number(reply, TAG_UPTIME, now_ms(CLOCK_BOOTTIME));
    put_boot_id(reply);
    put_string(reply, TAG_AGENT, AGENT_VERSION);
    if (process_main_pid() > 0)
        put_number(reply, TAG_PID, (uint64_t)process_main_pid());
    if (process_main_ended(&kind, &value))
        put_number(reply, TAG_EXITED, (uint64_t)kind << 32 | value);
    if (uname(&name) == 0)
        put_string(reply, TAG_RELEASE, name.release);
    return 0;
}

static void want_shutdown(uint64_t mode, uint64_t grace_ms) {
    uint64_t now = now_ms(CLOCK_MONOTONIC);
    guest_state = STATE_STOPPING;
    shutdown_wanted = true;
    shutdown_mode = mode;
    grace_end_ms = now + (grace_ms < LONGEST_GRACE_MS ? grace_ms : LONGEST_GRACE_MS);
    flush_end_ms = now + FLUSH_MS;
    main_end_ms = 0;
}

/* As container engines do with the one process they know: the others follow when it has ended, and have at least the
 * last fifth of the grace period. An init of the image knows itself what to end in which order. */
static void signal_main(uint64_t number) {
    pid_t pid = process_main_pid();
    if (pid <= 0 || number == 0 || !(standalone || boot_is_init()) || kill(pid, (int)number) != 0)
        return;
    uint64_t now = now_ms(CLOCK_MONOTONIC);
    main_end_ms = now + (grace_end_ms - now) / 5 * 4;
}

static int call_shutdown(struct fields *request, struct buffer *reply, struct failure *failure) {
    uint64_t mode = 0, grace_ms = DEFAULT_GRACE_MS, signal = 0;
    uint16_t tag;
    struct bytes value;
    (void)reply;
    while (fields_next(request, &tag, &value)) {
        uint64_t *number = tag == TAG_MODE     ? &mode
                           : tag == TAG_GRACE  ? &grace_ms
                           : tag == TAG_SIGNAL ? &signal
                                               : NULL;
        if (number != NULL && !value_number(value, number))
            return fail(failure, EINVAL, "mode, grace and signal of a shutdown are numbers");
    }
    if (mode > 1)
        return fail(failure, EINVAL, "%llu is not a shutdown mode", (unsigned long long)mode);
    if (signal > LAST_SIGNAL)
        return fail(failure, EINVAL, "%llu is not a signal", (unsigned long long)signal);
    want_shutdown(mode, grace_ms);
    signal_main(signal);
    return 0;
}

/* The main command may be waited for before it is started. */
static int wait_open(struct channel *channel, struct bytes request, struct failure *failure) {
    (void)request;
    (void)failure;
    channel->waits = true;
    channel_reply(channel, &(struct buffer){0});
    return 0;
}

static const struct {
    uint16_t kind;
    bool early; /* allowed before the guest is configured */
    call_handler *call;
    stream_handler *stream;
} kinds[] = {
    {OPEN_EXEC, false, NULL, exec_open},
    {OPEN_WRITE_TREE, false, NULL, write_tree_open},
    {OPEN_READ_TREE, false, NULL, read_tree_open},
    {OPEN_DIAL, false, NULL, dial_open},
    {OPEN_WAIT, false, NULL, wait_open},
    {CALL_CONFIGURE, true, call_configure, NULL},
    {CALL_STAT, false, call_stat, NULL},
    {CALL_HEALTH, true, call_health, NULL},
    {CALL_STATS, false, call_stats, NULL},
    {CALL_PORTS, false, call_ports, NULL},
    {CALL_CLOCK, false, call_clock, NULL},
    {CALL_RESEED, false, call_reseed, NULL},
    {CALL_SHUTDOWN, true, call_shutdown, NULL},
    {CALL_GROW, false, call_grow, NULL},
    {CALL_PROCESSES, false, call_processes, NULL},
};

static int run_call(uint32_t id, call_handler *call, struct bytes request, struct failure *failure) {
    struct fields fields = {request, false};
    struct buffer reply = {0};
    int code = call(&fields, &reply, failure);
    if (code == 0 && reply.failed)
        code = fail(failure, ENOMEM, "the guest is out of memory");
    if (code == 0 && reply.length > MAX_PAYLOAD)
        code = fail(failure, EMSGSIZE, "the answer is longer than a frame");
    if (code == 0)
        session_send(FRAME_REPLY, 0, id, reply.data, reply.length);
    buffer_free(&reply);
    return code;
}

static int run_stream(uint32_t id, stream_handler *stream, struct bytes request, struct failure *failure) {
    struct channel *channel = channel_new(id);
    if (channel == NULL)
        return fail(failure, EAGAIN, "more than %d commands, trees and connections at once", MAX_CHANNELS);
    int code = stream(channel, request, failure);
    if (code != 0)
        channel_free(channel);
    return code;
}

static bool well_formed(struct bytes request) {
    struct fields fields = {request, false};
    uint16_t tag;
    struct bytes value;
    while (fields_next(&fields, &tag, &value))
        ;
    return !fields.bad;
}

static int open_kind(uint32_t id, uint16_t kind, struct bytes request, struct failure *failure) {
    if (id & GUEST_ID)
        return fail(failure, EINVAL, "ids with the top bit set belong to channels that the guest opens");
    if (!well_formed(request))
        return fail(failure, EINVAL, "the fields of the request are malformed");
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (kinds[i].kind != kind)
            continue;
        if (guest_state == STATE_WAITING && !kinds[i].early)
            return fail(failure, EAGAIN, "the guest is not configured yet");
        if (kinds[i].call != NULL)
            return run_call(id, kinds[i].call, request, failure);
        return run_stream(id, kinds[i].stream, request, failure);
    }
    return fail(failure, ENOSYS, "this agent (%s) does not know requests of kind %u", AGENT_VERSION, kind);
}

void call_open(uint32_t id, struct bytes payload) {
    struct failure failure = {0};
    bool no_memory;
    if (!request_whole(id, payload, &payload, &no_memory) || channel_find(id) != NULL ||
        (payload.length < 2 && !no_memory)) {
        session_violation();
        return;
    }
    int code = no_memory ? fail(&failure, ENOMEM, "the guest is out of memory")
                         : open_kind(id, get_u16(payload.data), (struct bytes){payload.data + 2, payload.length - 2},
                                     &failure);
    request_forget();
    if (code != 0)
        session_send_error(id, &failure);
}

static void shut_down(uint64_t now) {
    shutdown_wanted = false;
    boot_shutdown(shutdown_mode, grace_end_ms > now ? grace_end_ms - now : 0);
    if (standalone)
        exit(0);
}

int call_after_flush(bool moved) {
    if (!init_changed && !session_pending() && guest_state == STATE_RUNNING && boot_wants_init()) {
        init_changed = true;
        boot_run_init();
        loop_reopen();
    }
    if (!shutdown_wanted)
        return -1;
    uint64_t now = now_ms(CLOCK_MONOTONIC);
    if (process_main_pid() > 0 && now < main_end_ms) {
        flush_end_ms = now + DRAIN_MS; /* for its last words */
        return (int)(main_end_ms - now);
    }
    bool pending = session_pending() || (main_end_ms != 0 && (moved || log_pending()));
    if (pending && now < flush_end_ms)
        return (int)(flush_end_ms - now);
    shut_down(now);
    return -1;
}

void call_signal(int number) {
    bool down = number == SIGUSR1 || number == SIGUSR2 || number == SIGPWR;
    bool reboot = number == SIGTERM || number == SIGINT;
    if (standalone && (reboot || number == SIGHUP || number == SIGQUIT)) {
        channels_hangup();
        exit(0);
    }
    if (standalone || !(down || reboot))
        return;
    if (boot_is_init())
        want_shutdown(reboot ? 1 : 0, DEFAULT_GRACE_MS);
    else
        guest_state = STATE_STOPPING; /* the image's init takes the guest down, and this process with it */
}
