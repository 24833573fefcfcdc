/* banger-agent: PID 1 of a guest, or an ordinary process that serves on a Unix socket. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "agent.h"
#include "call.h"
#include "log.h"
#include "loop.h"
#include "session.h"
#include "system.h"

enum { PORT_WAIT_MS = 30000, BACKLOG = 16 };

static const char *socket_path;

/* What is opened later must not land where children have their standard streams. */
static void fill_standard_descriptors(void) {
    int fd;
    do
        fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd > STDERR_FILENO)
        close(fd);
}

/* Five descriptors for each of the channels are more than the usual soft limit. */
static void raise_descriptor_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

/* The out-of-memory killer takes anything else first; commands get the normal value back. */
static void survive_memory_shortage(void) {
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    if (write(fd, "-1000", 5) < 0)
        perror("banger-agent: oom_score_adj");
    close(fd);
}

static void remove_socket(void) { unlink(socket_path); }

static int listen_on(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    unsigned port;
    if (sscanf(path, "vsock:%u", &port) == 1) {
        int fd = vsock_listen(port);
        if (fd < 0)
            fprintf(stderr, "banger-agent: cannot listen on port %u of vsock: %s\n", port, strerror(errno));
        return fd;
    }
    if (strlen(path) >= sizeof address.sun_path) {
        fprintf(stderr, "banger-agent: the socket path is longer than %zu bytes: %s\n", sizeof address.sun_path - 1,
                path);
        return -1;
    }
    strcpy(address.sun_path, path);
    unlink(path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 || listen(fd, BACKLOG) != 0) {
        fprintf(stderr, "banger-agent: cannot listen on %s: %s\n", path, strerror(errno));
        return -1;
    }
    socket_path = path;
    atexit(remove_socket);
    return fd;
}

_Noreturn static void run_guest(void) {
    boot_prepare();
    fill_standard_descriptors();
    survive_memory_shortage();
    loop_open();
    bool listens;
    int way = boot_open_way(PORT_WAIT_MS, &listens);
    if (way < 0 || !(listens ? session_use_listener(way, true) : session_use_port(way))) {
        fprintf(stderr, "banger-agent: there is neither a virtio-serial port " AGENT_PORT " nor a vsock device\n");
        boot_shutdown(0, 0);
    }
    if (listens)
        log_use_vsock(VMADDR_CID_HOST, VSOCK_LOG_PORT);
    else
        log_use_port(boot_open_port(LOG_PORT));
    loop_run();
}

static int run_process(const char *listen_path, const char *log_path) {
    fill_standard_descriptors();
    loop_open();
    call_setup(true);
    guest_state = STATE_RUNNING;
    int fd = listen_on(listen_path);
    if (fd < 0 || !session_use_listener(fd, false))
        return 1;
    unsigned cid, port;
    if (log_path != NULL && sscanf(log_path, "vsock:%u:%u", &cid, &port) == 2)
        log_use_vsock(cid, port);
    else if (log_path != NULL)
        log_use_path(log_path);
    loop_run();
}

int main(int count, char **arguments) {
    const char *listen_path = NULL, *log_path = NULL;
    raise_descriptor_limit();
    if (getpid() == 1)
        run_guest();
    if (count > 0 && strcmp(arguments[0], MODPROBE) == 0)
        return modprobe_main(count, arguments);
    for (int i = 1; i < count; i++) {
        if (strcmp(arguments[i], "--version") == 0) {
            printf("banger-agent %s, protocol %d\n", AGENT_VERSION, PROTOCOL_VERSION);
            return 0;
        }
        if (i + 1 < count && strcmp(arguments[i], "--listen") == 0)
            listen_path = arguments[++i];
        else if (i + 1 < count && strcmp(arguments[i], "--log") == 0)
            log_path = arguments[++i];
        else
            listen_path = NULL, i = count;
    }
    if (listen_path == NULL) {
        fprintf(stderr, "usage: banger-agent --listen SOCKET|vsock:PORT [--log FILE|vsock:CID:PORT]\n");
        return 2;
    }
    return run_process(listen_path, log_path);
}
