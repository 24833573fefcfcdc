/* configure: who this guest is: disks, host name, network, resolver, keys, environment; also its clock and entropy. */
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "init.h"
#include "system.h"

enum { MAX_STRING = 128 * 1024 - 1 }; /* of a variable: execve(2), "Limits on size of arguments and environment" */

static char *no_environment[] = {NULL};
char **configured_environment = no_environment;
enum guest_state guest_state = STATE_WAITING;

/* Ends with NULL. */
struct strings {
    char **items;
    size_t count, room;
};

struct configuration {
    struct disk disks[MAX_DISKS];
    struct interface interfaces[MAX_INTERFACES];
    size_t disk_count, interface_count;
    char hostname[65]; /* empty: not mentioned */
    struct strings nameservers, searches, hosts, keys, environment, volumes, directories, words;
    char *directory; /* where the words start */
    uint64_t init;   /* enum init_mode */
    bool init_given;
};

/* The last that was given: a later request may replace a part of what one file is made of. */
static struct strings nameservers, searches, hosts, environment;
/* What PID 1 is made of, kept for it. */
static struct strings words;
static char *directory;
static uint64_t chosen_init; /* enum init_mode */
static bool disks_tried, root_stands;

static void strings_free(struct strings *strings) {
    for (size_t i = 0; i < strings->count; i++)
        free(strings->items[i]);
    free(strings->items);
    *strings = (struct strings){0};
}

/* Each becomes a line of some file, or NAME=value: nothing may break out of its line. */
static bool is_line(const char *text) {
    for (; *text; text++)
        if ((unsigned char)*text < ' ' && *text != '\t')
            return false;
    return true;
}

static int add_string(struct strings *strings, struct bytes value, const char *what, bool line,
                      struct failure *failure) {
    char *text = value_string(value, MAX_STRING);
    if (!text || (line && !is_line(text))) {
        free(text);
        return fail(failure, EINVAL, "a %s of the configuration is not valid", what);
    }
    if (strings->count + 1 >= strings->room) {
        size_t room = strings->room ? 2 * strings->room : 16;
        char **items = realloc(strings->items, room * sizeof *items);
        if (!items) {
            free(text);
            return fail(failure, ENOMEM, "no memory for the configuration");
        }
        strings->items = items;
        strings->room = room;
    }
    strings->items[strings->count++] = text;
    strings->items[strings->count] = NULL;
    return 0;
}

static bool copy_text(struct bytes value, char *text, size_t size) {
    char *copy = value_string(value, size - 1);
    if (copy)
        memcpy(text, copy, strlen(copy) + 1);
    bool good = copy && is_line(copy);
    free(copy);
    return good;
}

static int parse_interface(struct bytes nested, struct interface *interface, struct failure *failure) {
    struct fields fields = {.rest = nested};
    struct bytes value;
    uint16_t tag = 0;
    bool good = true, has_mac = false;
    while (good && fields_next(&fields, &tag, &value)) {
        char text[64];
        if (tag == TAG_MAC) {
            good = has_mac = value.length == sizeof interface->mac;
            if (good)
                memcpy(interface->mac, value.data, sizeof interface->mac);
        } else if (tag == TAG_MTU) {
            good = value_number(value, &interface->mtu) && interface->mtu <= 65535;
        } else if (tag == TAG_CIDR) {
            good = interface->address_count < MAX_ADDRESSES && copy_text(value, text, sizeof text) &&
                   parse_address(text, true, &interface->addresses[interface->address_count++]);
        } else if (tag == TAG_GATEWAY) {
            good = interface->gateway_count < MAX_ADDRESSES && copy_text(value, text, sizeof text) &&
                   parse_address(text, false, &interface->gateways[interface->gateway_count++]);
        }
    }
    if (!good || fields.bad || !has_mac)
        return fail(failure, EINVAL, "an interface of the configuration is not valid (field %u)", tag);
    return 0;
}

static int parse_disk_fields(struct bytes nested, struct disk *disk, struct failure *failure) {
    struct fields fields = {.rest = nested};
    struct bytes value;
    uint16_t tag = 0;
    uint64_t readonly = 0;
    bool good = true;
    while (good && fields_next(&fields, &tag, &value)) {
        if (tag == TAG_SERIAL)
            good = copy_text(value, disk->serial, sizeof disk->serial);
        else if (tag == TAG_FSTYPE)
            good = copy_text(value, disk->fstype, sizeof disk->fstype);
        else if (tag == TAG_TARGET)
            good = copy_text(value, disk->target, sizeof disk->target);
        else if (tag == TAG_ROLE)
            good = value_number(value, &disk->role) && disk->role >= ROLE_IMAGE && disk->role <= ROLE_OTHER;
        else if (tag == TAG_READONLY)
            good = value_number(value, &readonly);
    }
    disk->readonly = readonly != 0;
    if (!good || fields.bad || !*disk->serial || !*disk->fstype || !disk->role)
        return fail(failure, EINVAL, "a disk of the configuration is not valid (field %u)", tag);
    return 0;
}

static int parse_field(struct configuration *configuration, uint16_t tag, struct bytes value,
                       struct failure *failure) {
    switch (tag) {
    case TAG_HOSTNAME:
        if (!copy_text(value, configuration->hostname, sizeof configuration->hostname) || !*configuration->hostname ||
            strpbrk(configuration->hostname, " \t/"))
            return fail(failure, EINVAL, "the host name is not valid or longer than 64 bytes");
        return 0;
    case TAG_INTERFACE:
        if (configuration->interface_count == MAX_INTERFACES)
            return fail(failure, EINVAL, "more than %d interfaces", MAX_INTERFACES);
        return parse_interface(value, &configuration->interfaces[configuration->interface_count++], failure);
    case TAG_DISK:
        if (configuration->disk_count == MAX_DISKS)
            return fail(failure, EINVAL, "more than %d disks", MAX_DISKS);
        return parse_disk_fields(value, &configuration->disks[configuration->disk_count++], failure);
    case TAG_INIT:
        configuration->init_given = true;
        if (!value_number(value, &configuration->init) || configuration->init > INIT_COMMAND)
            return fail(failure, EINVAL, "the init mode is none that there is");
        return 0;
    case TAG_ARG:
        return add_string(&configuration->words, value, "word of the init", false, failure);
    case TAG_CWD:
        free(configuration->directory);
        configuration->directory = value_string(value, PATH_MAX - 1);
        return configuration->directory ? 0 : fail(failure, EINVAL, "the directory of the init is not valid");
    case TAG_NAMESERVER:
        return add_string(&configuration->nameservers, value, "name server", true, failure);
    case TAG_SEARCH:
        return add_string(&configuration->searches, value, "search domain", true, failure);
    case TAG_HOST:
        return add_string(&configuration->hosts, value, "host line", true, failure);
    case TAG_KEY:
        return add_string(&configuration->keys, value, "key", true, failure);
    case TAG_VOLUME:
        return add_string(&configuration->volumes, value, "volume", true, failure);
    case TAG_DIRECTORY:
        return add_string(&configuration->directories, value, "directory", true, failure);
    case TAG_ENV:
        if (add_string(&configuration->environment, value, "variable", false, failure))
            return failure->code;
        return strchr(configuration->environment.items[configuration->environment.count - 1], '=')
                   ? 0
                   : fail(failure, EINVAL, "a variable of the environment has no '='");
    default:
        return 0;
    }
}

static int parse_configuration(struct fields *request, struct configuration *configuration,
                               struct failure *failure) {
    struct bytes value;
    uint16_t tag;
    while (fields_next(request, &tag, &value))
        if (parse_field(configuration, tag, value, failure))
            return failure->code;
    return request->bad ? fail(failure, EBADMSG, "the fields of configure are damaged") : 0;
}

static void append_text(struct buffer *buffer, const char *text) {
    buffer_append(buffer, text, strlen(text));
}

static void write_hosts(void) {
    char hostname[65] = "";
    gethostname(hostname, sizeof hostname - 1);
    struct buffer text = {0};
    append_text(&text, "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t");
    append_text(&text, hostname);
    append_text(&text, "\n");
    for (size_t i = 0; i < hosts.count; i++) {
        append_text(&text, hosts.items[i]);
        append_text(&text, "\n");
    }
    provide_file("/etc/hosts", &text);
    buffer_free(&text);
}

static void write_resolver(void) {
    struct buffer text = {0};
    for (size_t i = 0; i < nameservers.count; i++) {
        append_text(&text, "nameserver ");
        append_text(&text, nameservers.items[i]);
        append_text(&text, "\n");
    }
    for (size_t i = 0; i < searches.count; i++) {
        append_text(&text, i ? " " : "search ");
        append_text(&text, searches.items[i]);
    }
    if (searches.count)
        append_text(&text, "\n");
    provide_file("/etc/resolv.conf", &text);
    buffer_free(&text);
}

static int set_hostname(const char *hostname, struct failure *failure) {
    if (sethostname(hostname, strlen(hostname)) < 0)
        return fail(failure, errno, "cannot set the host name %s: %s", hostname, strerror(errno));
    struct buffer text = {0};
    append_text(&text, hostname);
    append_text(&text, "\n");
    provide_file("/etc/hostname", &text);
    buffer_free(&text);
    return 0;
}

/* Also where the home disk is, when that is elsewhere than root's home. The guest does without them if need be: a full
 * disk, or what a user has put in their place, must not keep it from starting. */
static void write_keys(char **keys) {
    struct failure failure;
    struct stat first, second;
    mkdir("/root", 0700);
    int slash = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int root = directory_open(slash, "/root", &failure), home = disks_home();
    close(slash);
    if (root < 0)
        console_print("cannot write the SSH keys: %s", failure.message);
    else if (keys_write(root, keys, &failure))
        console_print("cannot write the SSH keys of /root: %s", failure.message);
    bool same = root >= 0 && home >= 0 && fstat(root, &first) == 0 && fstat(home, &second) == 0 &&
                first.st_dev == second.st_dev && first.st_ino == second.st_ino;
    if (home >= 0 && !same && keys_write(home, keys, &failure))
        console_print("cannot write the SSH keys of the home disk: %s", failure.message);
    if (root >= 0)
        close(root);
}

/* Keeps what was given, when something was. */
static bool take(struct strings *current, struct strings *given) {
    if (!given->count)
        return false;
    strings_free(current);
    *current = *given;
    *given = (struct strings){0};
    return true;
}

static int apply_system(struct configuration *configuration, struct failure *failure) {
    if (*configuration->hostname && set_hostname(configuration->hostname, failure))
        return failure->code;
    bool new_hosts = take(&hosts, &configuration->hosts);
    if (new_hosts || *configuration->hostname)
        write_hosts();
    bool new_nameservers = take(&nameservers, &configuration->nameservers);
    bool new_searches = take(&searches, &configuration->searches);
    if (new_nameservers || new_searches)
        write_resolver();
    if (configuration->keys.count)
        write_keys(configuration->keys.items);
    for (size_t i = 0; i < configuration->interface_count; i++)
        if (net_configure(&configuration->interfaces[i], failure))
            return failure->code;
    return 0;
}

/* Working directories of images that do not have them, which container engines make, too. One that cannot be made is
 * named again, in an error, by each command that is to start there. */
static void make_directories(const struct strings *paths) {
    int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    for (size_t i = 0; i < paths->count; i++) {
        struct failure failure;
        int directory = directory_open(root, paths->items[i], &failure);
        if (directory < 0)
            console_print("%s", failure.message);
        else
            close(directory);
    }
    close(root);
}

static uint64_t judge(const struct strings *command, const char *start) {
    return command->count ? init_judge(command->items, start ? start : "/", boot_path()) : INIT_AGENT;
}

static bool has_pid_namespaces(void) {
    return access("/proc/self/ns/pid", F_OK) == 0;
}

/* An init of the image fills /run by itself, and what the image has there may be another boot's. */
static void empty_run(void) {
    struct failure failure;
    int run = open("/run", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (run >= 0 && remove_contents(run, &failure))
        console_print("cannot empty /run: %s", failure.message);
    if (run >= 0)
        close(run);
}

/* Decides who is PID 1, now that the image can be looked into. */
static int choose_init(struct configuration *configuration, struct failure *failure) {
    take(&words, &configuration->words);
    if (take(&environment, &configuration->environment))
        configured_environment = environment.items;
    directory = configuration->directory;
    configuration->directory = NULL;
    bool automatic = configuration->init == INIT_AUTO;
    chosen_init = automatic ? judge(&words, directory) : configuration->init;
    if (automatic && chosen_init == INIT_IMAGE)
        empty_run();
    if (chosen_init == INIT_COMMAND && !has_pid_namespaces()) {
        if (!automatic || !init_is_modest(words.items[0]))
            return fail(failure, ENOSYS,
                        "the guest's kernel has no PID namespaces (CONFIG_PID_NS), which a command that is PID 1 needs");
        chosen_init = INIT_AGENT;
    }
    return chosen_init == INIT_IMAGE ? boot_choose_init(words.items, directory ? directory : "/", failure) : 0;
}

/* The first configure: from the boot archive to the guest's own root. */
static int build_guest(struct configuration *configuration, struct failure *failure) {
    static char *no_volumes[] = {NULL};
    if (disks_tried)
        return fail(failure, EBUSY, "the disks could not be set up before: the guest has to be started again");
    disks_tried = true;
    char **volumes = configuration->volumes.count ? configuration->volumes.items : no_volumes;
    bool own_init = configuration->init == INIT_IMAGE;
    if (disks_mount(configuration->disks, configuration->disk_count, volumes, own_init, failure))
        return failure->code;
    root_stands = true;
    make_directories(&configuration->directories);
    if (net_loopback(failure) || choose_init(configuration, failure))
        return failure->code;
    drivers_prepare(chosen_init == INIT_IMAGE);
    if (chosen_init != INIT_IMAGE) {
        /* What container engines set for the images that run here: ping and ports below 1024 without privileges. */
        write_setting("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
        write_setting("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    }
    return 0;
}

static int apply(struct configuration *configuration, struct failure *failure) {
    if (boot_in_guest()) { /* as an ordinary process the agent leaves the machine it runs on alone */
        bool disks = configuration->disk_count || configuration->volumes.count || configuration->init_given;
        if (root_stands && disks)
            return fail(failure, EINVAL, "disks, volumes and the init mode can only be given at the start of a guest");
        if (!root_stands && build_guest(configuration, failure))
            return failure->code;
        if (apply_system(configuration, failure))
            return failure->code;
    } else if (configuration->init == INIT_AUTO) {
        chosen_init = judge(&configuration->words, configuration->directory);
    }
    if (take(&environment, &configuration->environment))
        configured_environment = environment.items;
    if (guest_state == STATE_WAITING)
        guest_state = STATE_RUNNING;
    return 0;
}

int call_configure(struct fields *request, struct buffer *reply, struct failure *failure) {
    struct configuration *configuration = calloc(1, sizeof *configuration);
    if (!configuration)
        return fail(failure, ENOMEM, "no memory for the configuration");
    int code = parse_configuration(request, configuration, failure);
    if (!code)
        code = apply(configuration, failure);
    if (!code)
        put_number(reply, TAG_INIT, chosen_init);
    struct strings *all[] = {&configuration->nameservers, &configuration->searches, &configuration->hosts,
                             &configuration->keys,        &configuration->volumes,  &configuration->directories,
                             &configuration->environment, &configuration->words};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        strings_free(all[i]);
    free(configuration->directory);
    free(configuration);
    return code;
}

/* Clock and random pool belong to the machine, so an ordinary process refuses to touch them. */
static int guest_only(struct failure *failure) {
    return boot_in_guest() ? 0 : fail(failure, EPERM, "this agent is no guest's: it changes nothing of its machine");
}

int call_clock(struct fields *request, struct buffer *reply, struct failure *failure) {
    (void)reply;
    struct bytes value;
    uint16_t tag;
    uint64_t time = 0;
    while (fields_next(request, &tag, &value))
        if (tag == TAG_TIME && !value_number(value, &time))
            return fail(failure, EINVAL, "the time is no number");
    if (request->bad || !time)
        return fail(failure, EINVAL, "the time to set is missing");
    if (guest_only(failure))
        return failure->code;
    struct timespec now = {.tv_sec = (time_t)(time / 1000000000), .tv_nsec = (long)(time % 1000000000)};
    return clock_settime(CLOCK_REALTIME, &now) < 0 ? fail(failure, errno, "cannot set the clock: %s", strerror(errno))
                                                   : 0;
}

int call_reseed(struct fields *request, struct buffer *reply, struct failure *failure) {
    (void)reply;
    enum { MAX_ENTROPY = 512 };
    union {
        struct rand_pool_info info;
        uint8_t space[sizeof(struct rand_pool_info) + MAX_ENTROPY];
    } pool = {0};
    struct bytes value, entropy = {0};
    uint16_t tag;
    while (fields_next(request, &tag, &value))
        if (tag == TAG_ENTROPY)
            entropy = value;
    if (request->bad || !entropy.length || entropy.length > MAX_ENTROPY)
        return fail(failure, EINVAL, "the entropy must be 1 to %d bytes", MAX_ENTROPY);
    if (guest_only(failure))
        return failure->code;
    memcpy(pool.info.buf, entropy.data, entropy.length);
    pool.info.buf_size = (int)entropy.length;
    pool.info.entropy_count = (int)entropy.length * 8; /* bits */
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    bool good = fd >= 0 && ioctl(fd, RNDADDENTROPY, &pool) == 0 && ioctl(fd, RNDRESEEDCRNG) == 0;
    int code = good ? 0 : fail(failure, errno, "cannot reseed the random pool: %s", strerror(errno));
    if (fd >= 0)
        close(fd);
    return code;
}
