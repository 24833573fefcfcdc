/* Tests the system part of the agent as far as it can run as an ordinary process; the rest runs in real guests. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "../system.h"
#include "check.h"

static char scratch[] = "/tmp/test_system.XXXXXX";
static struct failure failure;

static void remove_scratch(void) {
    check_remove_tree(scratch);
}

static int make_directory(const char *name) {
    return check_make_directory(scratch, name);
}

static struct stat status_of(int directory, const char *name) {
    struct stat status;
    CHECK(fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) == 0);
    return status;
}

static bool exists(int directory, const char *name) {
    return faccessat(directory, name, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

static void test_addresses(void) {
    struct address address;
    CHECK(parse_address("10.0.2.15/24", true, &address) && address.family == AF_INET && address.prefix == 24);
    CHECK(memcmp(address.bytes, "\x0a\0\2\x0f", 4) == 0);
    CHECK(parse_address("fd00::1/128", true, &address) && address.family == AF_INET6 && address.prefix == 128);
    CHECK(parse_address("0.0.0.0/0", true, &address) && parse_address("fe80::1", false, &address));
    static const char *const bad[] = {"10.0.2.15", "10.0.2.15/", "10.0.2.15/33", "10.0.2.15/-1",
                                      "10.0.2/24", "::1/129",    "::1/1x",       "/24",
                                      "::1/999",   "1::2::3/64", "",             "::/0000"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(!parse_address(bad[i], true, &address));
    CHECK(!parse_address("10.0.2.2/24", false, &address) && !parse_address("gateway", false, &address));
}

static void test_listener_lines(void) {
    struct listener listener;
    CHECK(parse_listener("   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 "
                         "12345 1 0000000000000000 100 0 0 10 0",
                         false, &listener));
    CHECK(strcmp(listener.address, "127.0.0.1") == 0 && listener.port == 8080 && listener.inode == 12345);
    CHECK(parse_listener(" 10: 0000000000000000FFFF00000100007F:0051 00000000000000000000000000000000:0000 0A 0:0 0:0 "
                         "0 0 0 7 1 0",
                         false, &listener));
    CHECK(strcmp(listener.address, "127.0.0.1") == 0 && listener.port == 81 && listener.inode == 7);
    CHECK(parse_listener("  1: 00000000000000000000000001000000:0016 00000000000000000000000000000000:0000 0A 0:0 0:0 "
                         "0 0 0 8 1 0",
                         false, &listener));
    CHECK(strcmp(listener.address, "::1") == 0);
    CHECK(parse_listener("  1: 00000000:0035 00000000:0000 07 0:0 0:0 0 0 0 9 2 0", true, &listener));
    CHECK(strcmp(listener.address, "0.0.0.0") == 0 && listener.port == 53);
    /* a connection, a connected udp socket, the header, nonsense */
    CHECK(!parse_listener("  1: 0100007F:1F90 0100007F:D431 01 0:0 0:0 0 0 0 9 1 0", false, &listener));
    CHECK(!parse_listener("  1: 00000000:0035 08080808:0035 01 0:0 0:0 0 0 0 9 2 0", true, &listener));
    CHECK(!parse_listener("  sl  local_address rem_address   st tx_queue", false, &listener));
    CHECK(!parse_listener("  1: 00000000:1F901 00000000:0000 0A 0:0 0:0 0 0 0 9 1 0", false, &listener));
    CHECK(!parse_listener("  1: 0000:0035 00000000:0000 0A 0:0 0:0 0 0 0 9 1 0", false, &listener));
    CHECK(!parse_listener("", false, &listener));
}

static void test_proc_lines(void) {
    uint64_t first, second;
    char name[64];
    CHECK(parse_cpu("cpu  10 20 30 400 50 6 7 8 9 10", &first, &second) && first == 531 && second == 81);
    CHECK(parse_cpu("cpu  1 2 3 4", &first, &second) && first == 10 && second == 6);
    CHECK(!parse_cpu("cpu0 1 2 3 4 5 6 7 8", &first, &second) && !parse_cpu("cpu  1 2", &first, &second));
    CHECK(parse_memory("MemTotal:         492978 kB", "MemTotal:", &first) && first == 492978 * 1024);
    CHECK(!parse_memory("MemTotalX:  1 kB", "MemTotal:", &first) && !parse_memory("MemTotal:", "MemTotal:", &first));
    CHECK(parse_disk(" 254       0 vda 100 1 2000 3 40 5 6000 7 0 8 9 10 11 12 13 14 15", name, &first, &second));
    CHECK(strcmp(name, "vda") == 0 && first == 2000 * 512 && second == 6000 * 512);
    CHECK(!parse_disk(" 254 0 vda 100 1", name, &first, &second));
    CHECK(parse_net("  eth0: 118 2 0 0 0 0 0 0 622 8 0 0 0 0 0 0", name, &first, &second));
    CHECK(strcmp(name, "eth0") == 0 && first == 118 && second == 622);
    CHECK(parse_net("eth0:118 2 0 0 0 0 0 0 622 8 0 0 0 0 0 0", name, &first, &second) && first == 118);
    CHECK(!parse_net("Inter-|   Receive       |  Transmit", name, &first, &second));

    struct process process;
    CHECK(parse_process("7 (a) b (c) S 1 7 7 34816 7 4194560 1 2 3", &process));
    CHECK(process.tty == 34816 && process.flags == 4194560);
    CHECK(parse_process("2 (kthreadd) S 0 0 0 0 -1 2129984 0", &process) && process.flags & PROCESS_KERNEL_THREAD);
    CHECK(!parse_process("7 (a", &process) && !parse_process("7 (a) S 1", &process));
    CHECK(process_read(getpid(), &process) && !(process.flags & PROCESS_KERNEL_THREAD));

    struct mount mount;
    CHECK(parse_mount("36 35 98:1 /a\\040b /mnt/x\\134\\011y rw shared:1 master:2 - ext4 /dev/vd\\040a rw", &mount));
    CHECK(mount.major == 98 && mount.minor == 1 && strcmp(mount.root, "/a b") == 0);
    CHECK(strcmp(mount.target, "/mnt/x\\\ty") == 0 && strcmp(mount.source, "/dev/vd a") == 0);
    CHECK(parse_mount("22 29 0:5 / /dev rw - devtmpfs devtmpfs rw", &mount) && strcmp(mount.fstype, "devtmpfs") == 0);
    CHECK(!parse_mount("22 29 0:5 / /dev rw", &mount) && !parse_mount("", &mount));
    CHECK(parse_mount("22 29 0:5 /\\ /a\\04 rw - t s rw", &mount) && strcmp(mount.target, "/a\\04") == 0);
}

static void make_home(int from) {
    struct timespec times[2] = {{1000000, 1}, {2000000, 2}};
    write_text(from, "file", "content");
    CHECK(fchmodat(from, "file", 0640, 0) == 0 && linkat(from, "file", from, "second", 0) == 0);
    CHECK(symlinkat("nowhere", from, "link") == 0 && mkfifoat(from, "fifo", 0600) == 0);
    CHECK(mkdirat(from, "directory", 0700) == 0 && mkdirat(from, "directory/below", 0755) == 0);
    CHECK(linkat(from, "file", from, "directory/below/third", 0) == 0);
    CHECK(utimensat(from, "file", times, 0) == 0 && utimensat(from, "link", times, AT_SYMLINK_NOFOLLOW) == 0);
    CHECK(utimensat(from, "directory", times, 0) == 0 && fchmod(from, 0710) == 0);
    if (geteuid() == 0)
        CHECK(fchownat(from, "link", 5, 6, AT_SYMLINK_NOFOLLOW) == 0 && fchownat(from, "file", 7, 8, 0) == 0 &&
              fchmodat(from, "file", 04640, 0) == 0);
}

static void check_home(int to) {
    CHECK(has_content(to, "file", "content") && has_content(to, "directory/below/third", "content"));
    struct stat file = status_of(to, "file"), link = status_of(to, "link");
    CHECK(file.st_nlink == 3 && status_of(to, "second").st_ino == file.st_ino);
    CHECK(status_of(to, "directory/below/third").st_ino == file.st_ino);
    CHECK(S_ISLNK(link.st_mode) && S_ISFIFO(status_of(to, "fifo").st_mode));
    CHECK(file.st_mtim.tv_sec == 2000000 && file.st_mtim.tv_nsec == 2 && link.st_mtim.tv_sec == 2000000);
    CHECK(status_of(to, "directory").st_mtim.tv_sec == 2000000);
    CHECK((status_of(to, "directory").st_mode & 07777) == 0700 && (status_of(to, ".").st_mode & 07777) == 0710);
    if (geteuid() == 0)
        CHECK(link.st_uid == 5 && link.st_gid == 6 && file.st_uid == 7 && (file.st_mode & 07777) == 04640);
    else
        CHECK((file.st_mode & 07777) == 0640);
}

static void test_copy(void) {
    int from = make_directory("from"), to = make_directory("to");
    make_home(from);
    const char text[] = "value";
    bool xattrs = fsetxattr(from, "user.test", text, sizeof text, 0) == 0;
    CHECK(copy_tree(from, to, &failure) == 0);
    check_home(to);
    char value[16];
    CHECK(!xattrs || (fgetxattr(to, "user.test", value, sizeof value) == sizeof text && strcmp(value, text) == 0));
    CHECK(copy_tree(from, to, &failure) == EEXIST);
    CHECK(remove_contents(to, &failure) == 0 && !exists(to, "file") && !exists(to, "directory"));
    CHECK(copy_tree(from, to, &failure) == 0);
    check_home(to);
    close(from);
    close(to);
}

/* Deeper than descriptors and the stack of the agent should go. */
static void test_deep_copy(void) {
    int from = make_directory("deep"), to = make_directory("shallow");
    int below = dup(from);
    for (int i = 0; i < 300; i++) {
        CHECK(mkdirat(below, "d", 0755) == 0);
        int next = openat(below, "d", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        CHECK(next >= 0);
        close(below);
        below = next;
    }
    close(below);
    CHECK(copy_tree(from, to, &failure) == ELOOP && strstr(failure.message, "200 directories"));
    CHECK(remove_contents(to, &failure) == 0 && !exists(to, "d"));
    close(from);
    close(to);
}

static bool is_ready(int home) {
    char state[16];
    return fgetxattr(home, "trusted.banger.home", state, sizeof state) == 5 && memcmp(state, "ready", 5) == 0;
}

static void test_home(void) {
    int from = make_directory("skeleton"), home = make_directory("home"), prepared = make_directory("prepared");
    if (fsetxattr(from, "trusted.banger.test", "", 0, 0) < 0) {
        printf("skipped: home disks need trusted xattrs: %s\n", strerror(errno));
        return;
    }
    make_home(from);
    CHECK(mkdirat(home, "lost+found", 0700) == 0);
    CHECK(seed_home(from, home, &failure) == 0 && is_ready(home) && !exists(home, "lost+found"));
    check_home(home);
    /* what the user does afterwards stays */
    CHECK(unlinkat(home, "second", 0) == 0);
    CHECK(seed_home(from, home, &failure) == 0 && !exists(home, "second"));
    /* a first attempt that did not get to its end */
    CHECK(fsetxattr(home, "trusted.banger.home", "seeding", 7, 0) == 0);
    write_text(home, "half", "");
    CHECK(seed_home(from, home, &failure) == 0 && is_ready(home) && !exists(home, "half"));
    check_home(home);
    /* a disk that the host has prepared */
    write_text(prepared, "own", "own");
    CHECK(mkdirat(prepared, "lost+found", 0700) == 0);
    CHECK(seed_home(from, prepared, &failure) == 0 && is_ready(prepared));
    CHECK(has_content(prepared, "own", "own") && !exists(prepared, "file") && !exists(prepared, "lost+found"));
    close(from);
    close(home);
    close(prepared);
}

static int call(call_handler *handler, struct buffer *request, struct buffer *reply) {
    struct fields fields = {.rest = {request->data, request->length}};
    return handler(&fields, reply, &failure);
}

static void test_configure(void) {
    char before[65], after[65];
    struct buffer request = {0}, reply = {0};
    CHECK(gethostname(before, sizeof before) == 0);
    put_string(&request, TAG_ENV, "NAME=value\nsecond line");
    put_string(&request, TAG_ENV, "EMPTY=");
    put_string(&request, TAG_HOSTNAME, "other");
    put_string(&request, 999, "from the future");
    CHECK(call(call_configure, &request, &reply) == 0 && guest_state == STATE_RUNNING);
    CHECK(strcmp(configured_environment[0], "NAME=value\nsecond line") == 0);
    CHECK(strcmp(configured_environment[1], "EMPTY=") == 0 && !configured_environment[2]);
    CHECK(gethostname(after, sizeof after) == 0 && strcmp(before, after) == 0);
    buffer_free(&request);
    put_string(&request, TAG_HOSTNAME, "other");
    CHECK(call(call_configure, &request, &reply) == 0 && configured_environment[1]);
    buffer_free(&request);

    static const struct {
        uint16_t tag;
        const char *value;
    } bad[] = {{TAG_ENV, "NAME"},       {TAG_HOSTNAME, ""},          {TAG_HOSTNAME, "a b"},  {TAG_HOST, "1.2.3.4 a\nb"},
               {TAG_KEY, "key\r\nkey"}, {TAG_INIT, "x"},             {TAG_INTERFACE, "x"},   {TAG_DISK, "abcdefgh"},
               {TAG_INTERFACE, ""},     {TAG_SEARCH, "a\nnameserver"}, {TAG_NAMESERVER, "\1"}, {TAG_VOLUME, "/a\n"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        put_string(&request, bad[i].tag, bad[i].value);
        CHECK(call(call_configure, &request, &reply) == EINVAL && *failure.message);
        buffer_free(&request);
    }
    put_bytes(&request, TAG_HOST, "a\0b", 3);
    CHECK(call(call_configure, &request, &reply) == EINVAL);
    request.length--;
    CHECK(call(call_configure, &request, &reply) == EBADMSG);
    buffer_free(&request);
    /* As many variables as there are, of what Linux takes in one. */
    for (size_t i = 0; i < 5000; i++)
        put_string(&request, TAG_ENV, "A=1");
    char longest[128 * 1024 + 1];
    memset(longest, '=', sizeof longest);
    put_bytes(&request, TAG_ENV, longest, sizeof longest - 2);
    CHECK(call(call_configure, &request, &reply) == 0 && strlen(configured_environment[5000]) == sizeof longest - 2);
    buffer_free(&request);
    put_bytes(&request, TAG_ENV, longest, sizeof longest - 1);
    CHECK(call(call_configure, &request, &reply) == EINVAL);
    buffer_free(&request);
    put_number(&request, TAG_TIME, 1);
    CHECK(call(call_clock, &request, &reply) == EPERM);
    buffer_free(&request);
    put_string(&request, TAG_ENTROPY, "entropy");
    CHECK(call(call_reseed, &request, &reply) == EPERM);
    buffer_free(&request);
    put_number(&request, TAG_ROLE, ROLE_HOME);
    CHECK(call(call_grow, &request, &reply) == ENODEV);
    buffer_free(&request);
    put_string(&request, TAG_ROLE, "home");
    CHECK(call(call_grow, &request, &reply) == EINVAL);
    buffer_free(&request);
    buffer_free(&reply);
}

static bool find_number(const struct buffer *reply, uint16_t wanted, uint64_t *number) {
    struct fields fields = {.rest = {reply->data, reply->length}};
    struct bytes value;
    uint16_t tag;
    while (fields_next(&fields, &tag, &value))
        if (tag == wanted)
            return value_number(value, number);
    return false;
}

/* Blocks of 4 KiB with 64bit numbers, then of 1 KiB without. */
static void test_superblock(void) {
    uint8_t superblock[1024] = {0};
    CHECK(superblock_size(superblock) == 0);
    memcpy(superblock + 56, "\x53\xEF", 2);
    memcpy(superblock + 4, "\0\0\0\x50", 4);
    superblock[24] = 2;
    superblock[96] = 0xC2;
    CHECK(superblock_size(superblock) == (uint64_t)5 << 40);
    superblock[336] = 1;
    CHECK(superblock_size(superblock) == ((uint64_t)5 << 40) + ((uint64_t)1 << 44));
    superblock[96] = 0x42;
    memcpy(superblock + 4, "\0\0\1\0", 4);
    superblock[24] = 0;
    CHECK(superblock_size(superblock) == 64 << 20);
    superblock[24] = 7;
    CHECK(superblock_size(superblock) == 0);
}

static void test_stats(void) {
    struct buffer request = {0}, reply = {0};
    CHECK(call(call_stats, &request, &reply) == 0);
    uint64_t total, busy, number, memory;
    CHECK(find_number(&reply, TAG_CPU_TOTAL, &total) && find_number(&reply, TAG_CPU_BUSY, &busy) && busy <= total);
    CHECK(find_number(&reply, TAG_CPUS, &number) && number == (uint64_t)sysconf(_SC_NPROCESSORS_ONLN));
    CHECK(find_number(&reply, TAG_MEM_TOTAL, &memory));
    CHECK(find_number(&reply, TAG_MEM_FREE, &number) && number <= memory);
    CHECK(find_number(&reply, TAG_LOAD, &number) && find_number(&reply, TAG_PROCESSES, &number) && number > 0);
    struct fields fields = {.rest = {reply.data, reply.length}};
    struct bytes value;
    uint16_t tag;
    bool root = false;
    while (fields_next(&fields, &tag, &value))
        root = root || (tag == TAG_FILESYSTEM && memmem(value.data, value.length, "\1\0\0\0/", 5));
    CHECK(root && !fields.bad);
    buffer_free(&reply);
}

static uint16_t listen_on(int family, const char *address, int *fd) {
    struct sockaddr_in6 name = {.sin6_family = AF_INET6};
    struct sockaddr_in *old = (struct sockaddr_in *)&name;
    if (family == AF_INET)
        old->sin_family = AF_INET;
    CHECK(inet_pton(family, address, family == AF_INET ? (void *)&old->sin_addr : (void *)&name.sin6_addr) == 1);
    socklen_t size = family == AF_INET ? sizeof *old : sizeof name;
    *fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (*fd < 0 || bind(*fd, (struct sockaddr *)&name, size) < 0)
        return 0;
    CHECK(listen(*fd, 1) == 0 && getsockname(*fd, (struct sockaddr *)&name, &size) == 0);
    return ntohs(name.sin6_port);
}

static bool is_listed(const char *address, uint16_t port) {
    struct buffer request = {0}, reply = {0}, wanted = {0};
    put_string(&wanted, TAG_PROTOCOL, "tcp");
    put_string(&wanted, TAG_ADDRESS, address);
    put_number(&wanted, TAG_PORT, port);
    put_number(&wanted, TAG_PID, (uint64_t)getpid());
    put_string(&wanted, TAG_NAME, "test_system");
    CHECK(call(call_ports, &request, &reply) == 0);
    struct fields fields = {.rest = {reply.data, reply.length}};
    struct bytes value;
    uint16_t tag;
    bool found = false;
    while (fields_next(&fields, &tag, &value))
        found = found || (tag == TAG_LISTENER && value.length == wanted.length &&
                          memcmp(value.data, wanted.data, wanted.length) == 0);
    buffer_free(&wanted);
    buffer_free(&reply);
    return found;
}

static void test_ports(void) {
    static const struct {
        int family;
        const char *address, *shown;
    } cases[] = {{AF_INET, "127.0.0.1", "127.0.0.1"},
                 {AF_INET6, "::1", "::1"},
                 {AF_INET6, "::ffff:127.0.0.1", "127.0.0.1"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int fd;
        uint16_t port = listen_on(cases[i].family, cases[i].address, &fd);
        if (port == 0) {
            printf("skipped: cannot listen on %s: %s\n", cases[i].address, strerror(errno));
            continue;
        }
        CHECK(is_listed(cases[i].shown, port));
        close(fd);
        CHECK(!is_listed(cases[i].shown, port));
    }
}

/* In a network namespace of its own, whose loopback interface is down at first. */
static void test_loopback(void) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        if (unshare(CLONE_NEWUSER | CLONE_NEWNET) < 0) {
            printf("skipped: no network namespaces here: %s\n", strerror(errno));
            fflush(stdout);
            _exit(0);
        }
        struct ifreq request = {.ifr_name = "lo"};
        int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        CHECK(ioctl(fd, SIOCGIFFLAGS, &request) == 0 && !(request.ifr_flags & IFF_UP));
        CHECK(net_loopback(&failure) == 0);
        CHECK(ioctl(fd, SIOCGIFFLAGS, &request) == 0 && request.ifr_flags & IFF_UP);
        close(fd);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

int main(void) {
    umask(022);
    CHECK(mkdtemp(scratch) != NULL);
    atexit(remove_scratch);
    test_addresses();
    test_listener_lines();
    test_proc_lines();
    test_copy();
    test_deep_copy();
    test_home();
    test_configure();
    test_superblock();
    test_stats();
    test_ports();
    test_loopback();
    return 0;
}
