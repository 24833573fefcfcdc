/* The log: records of u8 stream, u24 length, bytes. They wait for a slow reader; without a reader they are dropped. */
#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include "loop.h"
#include "ring.h"
#include "system.h"
#include "wire.h"

enum { LOG_HEADER = 4, LOG_CAPACITY = 4 * MAX_FRAME, RETRY_MS = 1000 };

static struct watch port = {.fd = -1};
static const char *log_path;
static unsigned vsock_cid, vsock_port; /* port 0: none */
static int64_t next_attempt;           /* to connect to it, in ms of the monotonic clock */
static uint8_t storage[LOG_CAPACITY];
static struct ring records = {storage, LOG_CAPACITY, 0, 0};

void log_use_port(int fd) {
    if (fd >= 0)
        watch_open(&port, fd);
}

void log_use_vsock(unsigned cid, unsigned number) {
    vsock_cid = cid;
    vsock_port = number;
}

void log_use_path(const char *path) { log_path = path; }

bool log_room(void) { return records.capacity - records.length >= LOG_HEADER + MAX_PAYLOAD; }

/* A virtio-serial port says POLLHUP while nobody has it open on the host. */
static bool reader_there(void) {
    if (port.fd < 0 && log_path != NULL) {
        int fd = open(log_path, O_WRONLY | O_CREAT | O_APPEND | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0600);
        if (fd >= 0)
            watch_open(&port, fd);
    }
    if (port.fd < 0 && vsock_port != 0 && now_ms() >= next_attempt) {
        int fd = vsock_connect(vsock_cid, vsock_port);
        next_attempt = now_ms() + RETRY_MS;
        if (fd >= 0)
            watch_open(&port, fd);
    }
    struct pollfd poller = {.fd = port.fd, .events = POLLOUT};
    return port.fd >= 0 && poll(&poller, 1, 0) >= 0 && !(poller.revents & (POLLHUP | POLLERR));
}

/* What was queued for a reader that has gone would reach the next one from the middle of a record on. */
static void reader_gone(void) {
    records.start = records.length = 0;
    if (log_path != NULL || vsock_port != 0)
        watch_close(&port);
}

void log_record(uint8_t stream, const uint8_t *data, size_t length) {
    uint8_t header[LOG_HEADER];
    if (!reader_there()) {
        reader_gone();
        return;
    }
    put_u32(header, (uint32_t)length << 8 | stream);
    ring_put(&records, records.length, header, sizeof header);
    ring_put(&records, records.length + sizeof header, data, length);
    records.length += sizeof header + length;
}

bool log_pending(void) { return records.length > 0; }

void log_pump(void) {
    while (records.length > 0 && port.writable) {
        struct iovec parts[2];
        ring_parts(&records, 0, records.length, parts);
        ssize_t count = writev(port.fd, parts, parts[1].iov_len > 0 ? 2 : 1);
        if (count > 0)
            ring_consume(&records, (size_t)count);
        else if (count < 0 && errno == EAGAIN)
            port.writable = false;
        else if (count == 0 || errno != EINTR)
            reader_gone();
    }
    if (records.length > 0 && !port.writable && !reader_there())
        reader_gone();
}
