/* Sets up network interfaces by rtnetlink(7), without any tool from the image. */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "system.h"

struct message {
    struct nlmsghdr header;
    union {
        struct ifinfomsg link;
        struct ifaddrmsg address;
        struct rtmsg route;
        char space[256]; /* the attributes follow the fixed part */
    } body;
};

bool parse_address(const char *text, bool prefixed, struct address *address) {
    char host[INET6_ADDRSTRLEN];
    size_t length = strcspn(text, "/");
    if (length >= sizeof host)
        return false;
    memcpy(host, text, length);
    host[length] = 0;
    *address = (struct address){.family = strchr(host, ':') ? AF_INET6 : AF_INET};
    if (inet_pton(address->family, host, address->bytes) != 1)
        return false;
    if (!prefixed)
        return text[length] == 0;
    const char *bits = text + length + 1;
    if (text[length] != '/' || bits[strspn(bits, "0123456789")] || strlen(bits) < 1 || strlen(bits) > 3)
        return false;
    int prefix = atoi(bits);
    address->prefix = (uint8_t)prefix;
    return prefix <= (address->family == AF_INET6 ? 128 : 32);
}

static size_t address_size(const struct address *address) {
    return address->family == AF_INET6 ? 16 : 4;
}

static struct message new_message(uint16_t type, uint16_t flags, size_t body) {
    struct message message = {.header = {.nlmsg_len = NLMSG_LENGTH(body), .nlmsg_type = type}};
    message.header.nlmsg_flags = NLM_F_REQUEST | flags;
    return message;
}

static void add_attribute(struct message *message, uint16_t type, const void *data, size_t length) {
    struct rtattr *attribute = (struct rtattr *)((char *)message + NLMSG_ALIGN(message->header.nlmsg_len));
    attribute->rta_type = type;
    attribute->rta_len = (uint16_t)RTA_LENGTH(length);
    memcpy(RTA_DATA(attribute), data, length);
    message->header.nlmsg_len = NLMSG_ALIGN(message->header.nlmsg_len) + (uint32_t)RTA_SPACE(length);
}

/* Sends a request and waits for its acknowledgement; 0 or an errno. */
static int request(int netlink, struct message *message) {
    message->header.nlmsg_flags |= NLM_F_ACK;
    if (send(netlink, message, message->header.nlmsg_len, 0) < 0)
        return errno;
    char answer[8192] __attribute__((aligned(NLMSG_ALIGNTO)));
    ssize_t length = recv(netlink, answer, sizeof answer, 0);
    if (length < 0)
        return errno;
    const struct nlmsghdr *header = (const struct nlmsghdr *)answer;
    if (!NLMSG_OK(header, (size_t)length) || header->nlmsg_type != NLMSG_ERROR)
        return EPROTO;
    return -((const struct nlmsgerr *)NLMSG_DATA(header))->error;
}

/* Collects those answers of a dump that `wanted` accepts as requests of type `type`; returns how many. */
static size_t dump(int netlink, struct message *question, uint16_t type, int index,
                   bool (*wanted)(const struct nlmsghdr *header, int index), struct message *found, size_t limit) {
    size_t count = 0;
    question->header.nlmsg_flags |= NLM_F_DUMP;
    if (send(netlink, question, question->header.nlmsg_len, 0) < 0)
        return 0;
    for (;;) {
        char answer[32768] __attribute__((aligned(NLMSG_ALIGNTO)));
        ssize_t received = recv(netlink, answer, sizeof answer, 0);
        if (received <= 0)
            return count;
        size_t left = (size_t)received;
        for (struct nlmsghdr *header = (struct nlmsghdr *)answer; NLMSG_OK(header, left);
             header = NLMSG_NEXT(header, left)) {
            if (header->nlmsg_type == NLMSG_DONE || header->nlmsg_type == NLMSG_ERROR)
                return count;
            if (count == limit || header->nlmsg_len > sizeof *found || !wanted(header, index))
                continue;
            memcpy(&found[count], header, header->nlmsg_len);
            found[count].header.nlmsg_type = type;
            found[count++].header.nlmsg_flags = NLM_F_REQUEST;
        }
    }
}

static bool is_own_address(const struct nlmsghdr *header, int index) {
    const struct ifaddrmsg *address = NLMSG_DATA(header);
    return header->nlmsg_type == RTM_NEWADDR && (int)address->ifa_index == index &&
           address->ifa_scope != RT_SCOPE_LINK;
}

static bool is_default_route(const struct nlmsghdr *header, int index) {
    const struct rtmsg *route = NLMSG_DATA(header);
    if (header->nlmsg_type != RTM_NEWROUTE || route->rtm_dst_len || route->rtm_table != RT_TABLE_MAIN)
        return false;
    size_t left = RTM_PAYLOAD(header);
    for (const struct rtattr *attribute = RTM_RTA(route); RTA_OK(attribute, left);
         attribute = RTA_NEXT(attribute, left))
        if (attribute->rta_type == RTA_OIF)
            return memcmp(RTA_DATA(attribute), &index, sizeof index) == 0;
    return false;
}

static void remove_old(int netlink, int index) {
    struct message found[64];
    struct message addresses = new_message(RTM_GETADDR, 0, sizeof(struct ifaddrmsg));
    size_t count = dump(netlink, &addresses, RTM_DELADDR, index, is_own_address, found, 64);
    for (size_t i = 0; i < count; i++)
        request(netlink, &found[i]); /* the kernel may have removed it together with another one */
    struct message routes = new_message(RTM_GETROUTE, 0, sizeof(struct rtmsg));
    count = dump(netlink, &routes, RTM_DELROUTE, index, is_default_route, found, 64);
    for (size_t i = 0; i < count; i++)
        request(netlink, &found[i]);
}

static int set_up(int netlink, int index, uint64_t mtu) {
    struct message message = new_message(RTM_NEWLINK, 0, sizeof(struct ifinfomsg));
    message.body.link = (struct ifinfomsg){.ifi_index = index, .ifi_flags = IFF_UP, .ifi_change = IFF_UP};
    uint32_t value = (uint32_t)mtu;
    if (mtu)
        add_attribute(&message, IFLA_MTU, &value, sizeof value);
    return request(netlink, &message);
}

static int add_address(int netlink, int index, const struct address *address) {
    struct message message = new_message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, sizeof(struct ifaddrmsg));
    message.body.address = (struct ifaddrmsg){
        .ifa_family = (uint8_t)address->family, .ifa_prefixlen = address->prefix, .ifa_index = (uint32_t)index};
    /* Nobody else is on the guest's link, and duplicate address detection takes a second or two. */
    if (address->family == AF_INET6)
        message.body.address.ifa_flags = IFA_F_NODAD;
    add_attribute(&message, IFA_LOCAL, address->bytes, address_size(address));
    add_attribute(&message, IFA_ADDRESS, address->bytes, address_size(address));
    if (address->family == AF_INET && address->prefix < 31) {
        uint32_t broadcast;
        memcpy(&broadcast, address->bytes, sizeof broadcast);
        broadcast |= htonl(UINT32_MAX >> address->prefix);
        add_attribute(&message, IFA_BROADCAST, &broadcast, sizeof broadcast);
    }
    return request(netlink, &message);
}

static int add_gateway(int netlink, int index, const struct address *gateway) {
    struct message message = new_message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, sizeof(struct rtmsg));
    /* "onlink": the gateway need not lie within the interface's own network. */
    message.body.route = (struct rtmsg){.rtm_family = (uint8_t)gateway->family,
                                        .rtm_table = RT_TABLE_MAIN,
                                        .rtm_protocol = RTPROT_BOOT,
                                        .rtm_scope = RT_SCOPE_UNIVERSE,
                                        .rtm_type = RTN_UNICAST,
                                        .rtm_flags = RTNH_F_ONLINK};
    add_attribute(&message, RTA_GATEWAY, gateway->bytes, address_size(gateway));
    add_attribute(&message, RTA_OIF, &index, sizeof index);
    return request(netlink, &message);
}

/* What the host gives is all there is to be: no routes or addresses from router advertisements beside it. */
static void refuse_advertisements(int index) {
    char name[IF_NAMESIZE], path[96];
    if (!if_indextoname((unsigned)index, name))
        return;
    snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/accept_ra", name);
    write_setting(path, "0");
}

struct search {
    const uint8_t *mac;
    int index;
};

/* Only devices with hardware behind them: bridges and the like may carry the same address. */
static bool interface_found(void *context) {
    struct search *search = context;
    char wanted[24];
    const uint8_t *mac = search->mac;
    snprintf(wanted, sizeof wanted, "%02x:%02x:%02x:%02x:%02x:%02x", mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]);
    DIR *interfaces = opendir("/sys/class/net");
    struct dirent *entry;
    while (interfaces && !search->index && (entry = readdir(interfaces))) {
        char path[320], address[64];
        snprintf(path, sizeof path, "/sys/class/net/%s/device", entry->d_name);
        if (access(path, F_OK) < 0)
            continue;
        snprintf(path, sizeof path, "/sys/class/net/%s/address", entry->d_name);
        if (read_line(path, address, sizeof address) && strcmp(address, wanted) == 0)
            search->index = (int)if_nametoindex(entry->d_name);
    }
    if (interfaces)
        closedir(interfaces);
    return search->index != 0;
}

static int open_netlink(struct failure *failure) {
    int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (netlink < 0)
        fail(failure, errno, "cannot open a netlink socket: %s", strerror(errno));
    return netlink;
}

int net_loopback(struct failure *failure) {
    int netlink = open_netlink(failure);
    if (netlink < 0)
        return failure->code;
    int code = set_up(netlink, (int)if_nametoindex("lo"), 0);
    close(netlink);
    return code ? fail(failure, code, "cannot set up the loopback interface: %s", strerror(code)) : 0;
}

static int refused(int code, const char *what, const struct address *address, struct failure *failure) {
    char text[INET6_ADDRSTRLEN];
    inet_ntop(address->family, address->bytes, text, sizeof text);
    return fail(failure, code, "cannot set the %s %s: %s", what, text, strerror(code));
}

int net_configure(const struct interface *interface, struct failure *failure) {
    struct search search = {interface->mac, 0};
    const uint8_t *mac = interface->mac;
    if (!device_wait(interface_found, &search, DEVICE_WAIT_MS))
        return fail(failure, ENODEV, "there is no network interface %02x:%02x:%02x:%02x:%02x:%02x", mac[0], mac[1],
                    mac[2], mac[3], mac[4], mac[5]);
    int netlink = open_netlink(failure);
    if (netlink < 0)
        return failure->code;
    bool ipv6 = access("/proc/net/if_inet6", F_OK) == 0; /* a kernel without it gets along with IPv4 */
    refuse_advertisements(search.index);
    remove_old(netlink, search.index);
    int code = set_up(netlink, search.index, interface->mtu);
    if (code)
        fail(failure, code, "cannot set up the network interface: %s", strerror(code));
    for (size_t i = 0; !code && i < interface->address_count; i++) {
        const struct address *address = &interface->addresses[i];
        if ((ipv6 || address->family == AF_INET) && (code = add_address(netlink, search.index, address)))
            refused(code, "address", address, failure);
    }
    for (size_t i = 0; !code && i < interface->gateway_count; i++) {
        const struct address *gateway = &interface->gateways[i];
        if ((ipv6 || gateway->family == AF_INET) && (code = add_gateway(netlink, search.index, gateway)))
            refused(code, "gateway", gateway, failure);
    }
    close(netlink);
    return code;
}
