/* What the parts of the agent use from each other. */
#ifndef BANGER_AGENT_H
#define BANGER_AGENT_H

#include <linux/limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "protocol.h"

#define AGENT_VERSION "0.1.0"

/* fields.c: reading and writing fields ------------------------------------------------------------------------- */

struct bytes {
    const uint8_t *data;
    size_t length;
};

/* Reads fields one by one; `bad` becomes true at the first one that does not fit. */
struct fields {
    struct bytes rest;
    bool bad;
};

bool fields_next(struct fields *fields, uint16_t *tag, struct bytes *value);
bool value_number(struct bytes value, uint64_t *number);
/* A copy with a final NUL, to be freed; NULL when it holds a NUL, is longer than `limit` or memory is short. */
char *value_string(struct bytes value, size_t limit);

/* Grows as needed; after a failed allocation `failed` is true and all that follows is dropped. */
struct buffer {
    uint8_t *data;
    size_t length, capacity;
    bool failed;
};

void buffer_append(struct buffer *buffer, const void *data, size_t length);
void buffer_free(struct buffer *buffer);
void put_bytes(struct buffer *buffer, uint16_t tag, const void *data, size_t length);
void put_string(struct buffer *buffer, uint16_t tag, const char *text);
void put_number(struct buffer *buffer, uint16_t tag, uint64_t number);
/* Appends the fields in `nested`, and frees them. */
void put_nested(struct buffer *buffer, uint16_t tag, struct buffer *nested);

/* Why a request failed: a Linux errno and a sentence for the user. */
struct failure {
    int code;
    char message[512];
};

/* Fills `failure` and returns `code`, so that a handler can `return fail(...)`. */
int fail(struct failure *failure, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* A call: reads its fields, appends to the reply; 0 or the errno that is also in `failure`. It may block. */
typedef int call_handler(struct fields *request, struct buffer *reply, struct failure *failure);

/* What commands look for programs in, unless somebody says it. */
#define USUAL_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

/* config.c, net.c, disks.c, boot.c: the guest as a system ------------------------------------------------------- */

call_handler call_configure; /* first time: disks, root, network, init; later: whatever the request holds */
call_handler call_clock;
call_handler call_reseed;

/* Default environment of commands, from configure: "NAME=value" strings, NULL-terminated. */
extern char **configured_environment;
extern enum guest_state guest_state;

/* As PID 1 of the boot archive: mounts /proc, /sys and /dev, loads /modules in order. Powers off on failure. */
void boot_prepare(void);
/* The descriptor of the virtio-serial port of that name, non-blocking; -1 when there is none. */
int boot_open_port(const char *name);
/* Waits for a way to the host: the descriptor of the port AGENT_PORT or, where there is a vsock device instead, with
 * `listens` set, of a socket that listens on VSOCK_AGENT_PORT. -1 after `wait_ms`. */
int boot_open_way(int wait_ms, bool *listens);
/* True once configure has asked for init=image: the main loop then flushes its output and calls boot_run_init. */
bool boot_wants_init(void);
/* Forks: PID 1 executes the image's init and does not return, the child (argv[0] "@banger-agent") returns. */
void boot_run_init(void);
/* Ends the guest: as PID 1 SIGTERM, `grace_ms`, SIGKILL, sync, unmount, power off; with another init asks that one.
 * Returns only when another init does the work, or as an ordinary process. */
void boot_shutdown(uint64_t mode, uint64_t grace_ms);
/* True when this process is PID 1 (and stays it). */
bool boot_is_init(void);

/* stats.c, ports.c, processes.c, grow.c */
call_handler call_stats;
call_handler call_ports;
call_handler call_processes;
call_handler call_grow;

/* tar.c, stat.c: file trees; both block, and run in a child process ---------------------------------------------- */

struct tree_options {
    uint64_t flags; /* enum tree_flags */
    bool set_owner; /* extract: give everything to uid:gid instead of the owners in the stream */
    uid_t uid;
    gid_t gid;
};

/* Extracts a tar stream from `in` below the directory `path` (made when it is missing). 0 or -1 with `failure`. */
int tar_extract(int in, const char *path, const struct tree_options *options, struct failure *failure);
/* Writes the tree at `path` as a tar stream to `out`. */
int tar_create(int out, const char *path, const struct tree_options *options, struct failure *failure);

call_handler call_stat;

/* user.c: accounts from the guest's /etc/passwd and /etc/group, without libc's NSS -------------------------------- */

struct account {
    uid_t uid;
    gid_t gid;
    gid_t groups[4096];
    size_t group_count;
    char name[256], home[PATH_MAX], shell[PATH_MAX];
};

/* Finds NAME, UID, NAME:GROUP or UID:GID, digits being an id even where there is such a name; a uid without an entry is
 * fine (home "/", shell "/bin/sh"). */
int account_find(const char *user, struct account *account, struct failure *failure);

/* loop.c --------------------------------------------------------------------------------------------------------- */

/* After a fork whose child goes on as the agent: makes a new epoll and signalfd with the same descriptors. */
void loop_reopen(void);

#endif
