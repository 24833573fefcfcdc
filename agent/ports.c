/* ports: which sockets of the guest listen, and whose they are. */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "system.h"

enum { MAX_LISTENERS = 400, STATE_LISTEN = 0x0a, STATE_CLOSE = 0x07 }; /* states of include/net/tcp_states.h */

struct owned_listener {
    struct listener listener;
    const char *protocol;
    int pid; /* 0: not found */
};

/* The address of /proc/net/tcp: words of 32 bits in the machine's own byte order, as hexadecimal numbers. */
static bool parse_socket_address(const char *text, char address[INET6_ADDRSTRLEN]) {
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff}; /* RFC 4291, section 2.5.5.2 */
    uint32_t words[4];
    size_t count = strlen(text) / 8;
    if (strlen(text) % 8 || (count != 1 && count != 4))
        return false;
    for (size_t i = 0; i < count; i++)
        if (sscanf(text + 8 * i, "%8" SCNx32, &words[i]) != 1)
            return false;
    const uint8_t *bytes = (const uint8_t *)words;
    if (count == 4 && memcmp(bytes, mapped, sizeof mapped) == 0)
        return inet_ntop(AF_INET, bytes + sizeof mapped, address, INET6_ADDRSTRLEN) != NULL;
    return inet_ntop(count == 4 ? AF_INET6 : AF_INET, bytes, address, INET6_ADDRSTRLEN) != NULL;
}

bool parse_listener(const char *line, bool udp, struct listener *listener) {
    char local[33], remote[33];
    unsigned port, remote_port, state;
    if (sscanf(line, " %*u: %32[0-9A-Fa-f]:%x %32[0-9A-Fa-f]:%x %x %*s %*s %*s %*u %*u %" SCNu64, local, &port, remote,
               &remote_port, &state, &listener->inode) != 6)
        return false;
    if (state != (udp ? STATE_CLOSE : STATE_LISTEN) || remote_port || !port || port > UINT16_MAX)
        return false;
    listener->port = (uint16_t)port;
    return parse_socket_address(local, listener->address);
}

static size_t read_listeners(const char *path, const char *protocol, struct owned_listener *listeners, size_t count) {
    FILE *file = fopen(path, "re");
    if (!file)
        return count;
    char *line = NULL;
    size_t size = 0;
    while (count < MAX_LISTENERS && getline(&line, &size, file) > 0)
        if (parse_listener(line, protocol[0] == 'u', &listeners[count].listener))
            listeners[count++].protocol = protocol;
    free(line);
    fclose(file);
    return count;
}

static void match_sockets(int pid, struct owned_listener *listeners, size_t count) {
    char path[64], target[64];
    snprintf(path, sizeof path, "/proc/%d/fd", pid);
    DIR *descriptors = opendir(path);
    if (!descriptors)
        return;
    struct dirent *entry;
    while ((entry = readdir(descriptors))) {
        ssize_t length = readlinkat(dirfd(descriptors), entry->d_name, target, sizeof target - 1);
        uint64_t inode;
        if (length < 0)
            continue;
        target[length] = 0;
        if (sscanf(target, "socket:[%" SCNu64 "]", &inode) != 1)
            continue;
        for (size_t i = 0; i < count; i++)
            if (!listeners[i].pid && listeners[i].listener.inode == inode)
                listeners[i].pid = pid; /* the first, which is the parent of a server's workers */
    }
    closedir(descriptors);
}

static void find_owners(struct owned_listener *listeners, size_t count) {
    DIR *processes = count ? opendir("/proc") : NULL;
    if (!processes)
        return;
    struct dirent *entry;
    while ((entry = readdir(processes)))
        if (atoi(entry->d_name) > 0)
            match_sockets(atoi(entry->d_name), listeners, count);
    closedir(processes);
}

static void put_listener(struct buffer *reply, const struct owned_listener *owned) {
    struct buffer nested = {0};
    put_string(&nested, TAG_PROTOCOL, owned->protocol);
    put_string(&nested, TAG_ADDRESS, owned->listener.address);
    put_number(&nested, TAG_PORT, owned->listener.port);
    char path[64], name[64];
    snprintf(path, sizeof path, "/proc/%d/comm", owned->pid);
    if (owned->pid && read_line(path, name, sizeof name)) {
        put_number(&nested, TAG_PID, (uint64_t)owned->pid);
        put_string(&nested, TAG_NAME, name);
    }
    put_nested(reply, TAG_LISTENER, &nested);
}

int call_ports(struct fields *request, struct buffer *reply, struct failure *failure) {
    (void)request;
    struct owned_listener *listeners = calloc(MAX_LISTENERS, sizeof *listeners);
    if (!listeners)
        return fail(failure, ENOMEM, "no memory for the list of ports");
    size_t count = read_listeners("/proc/net/tcp", "tcp", listeners, 0);
    count = read_listeners("/proc/net/tcp6", "tcp", listeners, count);
    count = read_listeners("/proc/net/udp", "udp", listeners, count);
    count = read_listeners("/proc/net/udp6", "udp", listeners, count);
    find_owners(listeners, count);
    for (size_t i = 0; i < count; i++)
        put_listener(reply, &listeners[i]);
    free(listeners);
    return reply->failed ? fail(failure, ENOMEM, "no memory for the list of ports") : 0;
}
