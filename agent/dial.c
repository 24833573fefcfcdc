/* TCP connections in the guest, for port forwards. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "call.h"
#include "session.h"

union address {
    struct sockaddr any;
    struct sockaddr_in four;
    struct sockaddr_in6 six;
};

static socklen_t parse_address(const char *text, uint16_t port, union address *address) {
    memset(address, 0, sizeof *address);
    if (inet_pton(AF_INET, text, &address->four.sin_addr) == 1) {
        address->four.sin_family = AF_INET;
        address->four.sin_port = htons(port);
        return sizeof address->four;
    }
    if (inet_pton(AF_INET6, text, &address->six.sin6_addr) == 1) {
        address->six.sin6_family = AF_INET6;
        address->six.sin6_port = htons(port);
        return sizeof address->six;
    }
    return 0;
}

static int read_request(struct bytes request, char host[INET6_ADDRSTRLEN], uint16_t *port, struct failure *failure) {
    struct fields fields = {request, false};
    uint64_t number = 0;
    uint16_t tag;
    struct bytes value;
    strcpy(host, "127.0.0.1");
    while (fields_next(&fields, &tag, &value)) {
        if (tag == TAG_PORT && !value_number(value, &number))
            return fail(failure, EINVAL, "a port is a number");
        if (tag != TAG_ADDRESS)
            continue;
        char *text = value_string(value, INET6_ADDRSTRLEN - 1);
        if (text == NULL)
            return fail(failure, EINVAL, "the address is not a numeric IPv4 or IPv6 address");
        strcpy(host, text);
        free(text);
    }
    if (number < 1 || number > 65535)
        return fail(failure, EINVAL, "%llu is not a port", (unsigned long long)number);
    *port = (uint16_t)number;
    return 0;
}

/* REPLY once the connection stands, ERROR when it was refused. */
static bool dial_start(struct channel *channel) {
    int error = 0;
    socklen_t length = sizeof error;
    if (!channel->input.writable)
        return false;
    getsockopt(channel->input.fd, SOL_SOCKET, SO_ERROR, &error, &length);
    if (error == 0) {
        channel_reply(channel, &(struct buffer){0});
        return true;
    }
    struct failure failure;
    fail(&failure, error, "cannot connect: %s", strerror(error));
    channel_fail(channel, &failure);
    return true;
}

int dial_open(struct channel *channel, struct bytes request, struct failure *failure) {
    char host[INET6_ADDRSTRLEN];
    uint16_t port = 0;
    union address address;
    int code = read_request(request, host, &port, failure);
    if (code != 0)
        return code;
    socklen_t length = parse_address(host, port, &address);
    if (length == 0)
        return fail(failure, EINVAL, "'%s' is not a numeric IPv4 or IPv6 address", host);
    int fd = socket(address.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return fail(failure, errno, "cannot make a socket: %s", strerror(errno));
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(fd, &address.any, length) != 0 && errno != EINPROGRESS) {
        code = fail(failure, errno, "cannot connect to %s port %u: %s", host, port, strerror(errno));
        close(fd);
        return code;
    }
    /* Two descriptors, so that both directions end on their own. */
    int other = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    bool watched = watch_open(&channel->input, fd);
    if (other < 0 || !channel_source(channel, 0, other) || !watched)
        return fail(failure, ENOMEM, "cannot watch another connection");
    channel->dial = true;
    channel->start = dial_start;
    return 0;
}
