/* What the system part of the agent (boot, disks, configuration, shutdown, stats) shares among its own files. */
#ifndef BANGER_SYSTEM_H
#define BANGER_SYSTEM_H

#include <netinet/in.h>
#include <stdio.h>

#include "agent.h"

/* boot.c -------------------------------------------------------------------------------------------------------- */

/* One line "banger: ..." on the guest's console. */
void console_print(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* True when this process came out of a boot archive, so that the whole system is the agent's to change. */
bool boot_in_guest(void);
/* True where a guest that powers off is not seen to, so that it has to reset instead: Firecracker. */
bool boot_resets_only(void);
/* Remembers an init of the image for boot_run_init: `words` (ends with NULL), which are started in `directory` and stay
 * where they are, or without any the one that is found in the usual places. 0 or an errno. */
int boot_choose_init(char **words, const char *directory, struct failure *failure);
/* The PATH that configure gave, or the usual one. */
const char *boot_path(void);
/* Calls `found` now and after each change of the device tree until it is true or `wait_ms` are over. */
bool device_wait(bool (*found)(void *context), void *context, int wait_ms);

/* vsock.c ------------------------------------------------------------------------------------------------------- */

/* True when there is a virtio socket device; the module alone says nothing. */
bool vsock_present(void);
/* A listening socket, non-blocking; -1 when there cannot be one. */
int vsock_listen(unsigned port);
/* A connection, non-blocking; -1 when nobody answers at once. */
int vsock_connect(unsigned cid, unsigned port);
/* False for a connection from within the guest (vsock_loopback), which might be anybody's. */
bool vsock_from_host(int fd);

/* system.c ------------------------------------------------------------------------------------------------------ */

/* The first `size` - 1 bytes of a file, or fewer, with a NUL behind them; how many, -1 when it cannot be read. */
ssize_t read_start(const char *path, char *text, size_t size);
/* The first line of a small file without its newline; false when it cannot be read. */
bool read_line(const char *path, char *line, size_t size);
/* Writes to a file below /proc that a kernel may lack. */
void write_setting(const char *path, const char *text);
/* Milliseconds of the monotonic clock. */
int64_t now_ms(void);

/* disks.c ------------------------------------------------------------------------------------------------------- */

enum { MAX_DISKS = 32, DEVICE_WAIT_MS = 10000 };

struct disk {
    char serial[64], fstype[32], target[1024];
    uint64_t role; /* enum disk_role */
    bool readonly;
};

/* Mounts the disks, builds the root over image and overlay, and makes it this process's root. `volumes` ends with
 * NULL. With `own_init` the image's init fills /run; otherwise it gets what the image has there. */
int disks_mount(const struct disk *disks, size_t count, char **volumes, bool own_init, struct failure *failure);
/* The home disk, wherever it is mounted, as an O_PATH descriptor that stays; -1 without one. */
int disks_home(void);
/* The mounted disk of a role that is written to, overlay or home, as an O_PATH descriptor that stays; -1 without one. */
int disks_of_role(uint64_t role);
/* Makes the disk below the root filesystem read-only, so that it is clean; for the very end. */
void disks_freeze(void);

/* places.c ------------------------------------------------------------------------------------------------------ */

/* Where disks are mounted whose own place in the image cannot be made. */
#define SPARE_PLACES "/run/banger/"

bool same_directory(int a, int b);
/* Opens (O_PATH) the directory `path` below `root`, whose links are resolved inside of that root, and makes what is
 * missing. -1 with `failure` when something that is no directory is in the way. */
int directory_open(int root, const char *path, struct failure *failure);
/* The same, but for the root itself, on which nothing may be mounted. */
int mount_point_open(int root, const char *path, struct failure *failure);
/* Opens the directory /`name` of the guest, which there has to be, and makes it with this mode; with `linked` what a link
 * leads to does, too. Anything else that is there is renamed. -1 with `failure`. */
int system_directory(int root, const char *name, mode_t mode, bool linked, struct failure *failure);

/* grow.c -------------------------------------------------------------------------------------------------------- */

enum { MIN_GROWTH = 1 << 20 };

/* The bytes of an ext4 filesystem by its superblock; 0 when it is none. */
uint64_t superblock_size(const uint8_t superblock[1024]);
/* Grows the ext4 filesystem of `device`, mounted on `target`, to its disk's size when that has become larger; says on the
 * console when it cannot. */
void disk_fill(const char *device, const char *target);

/* copy.c -------------------------------------------------------------------------------------------------------- */

/* Copies what is in the directory `from`, and the directory's own owner, mode, times and xattrs, to the directory `to`
 * (not O_PATH): types, owners, modes, xattrs, hard links and times are kept. 0 or an errno with `failure`. */
int copy_tree(int from, int to, struct failure *failure);
/* Removes all that is in the directory `directory` (not O_PATH). 0 or an errno with `failure`. */
int remove_contents(int directory, struct failure *failure);
/* False also when it cannot be read. */
bool is_empty(int directory);
/* Puts the content of `from` on a new home disk mounted at `home`, once; an interrupted attempt is begun again. */
int seed_home(int from, int home, struct failure *failure);

/* net.c --------------------------------------------------------------------------------------------------------- */

enum { MAX_INTERFACES = 16, MAX_ADDRESSES = 16 };

struct address {
    int family; /* AF_INET or AF_INET6 */
    uint8_t bytes[16];
    uint8_t prefix; /* bits */
};

struct interface {
    uint8_t mac[6];
    uint64_t mtu; /* 0: the driver's own */
    struct address addresses[MAX_ADDRESSES], gateways[MAX_ADDRESSES];
    size_t address_count, gateway_count;
};

/* Reads "ADDRESS" or, with `prefixed`, "ADDRESS/BITS". */
bool parse_address(const char *text, bool prefixed, struct address *address);
int net_loopback(struct failure *failure);
/* Finds the interface by its MAC and replaces its addresses and default routes. */
int net_configure(const struct interface *interface, struct failure *failure);

/* files.c -------------------------------------------------------------------------------------------------------- */

/* Puts the content into a file for the guest's convenience, /etc/hosts and the like, or else mounts a file of /run there.
 * Where neither works the console says so: the guest does without. */
void provide_file(const char *path, const struct buffer *content);
/* Writes a file beside its place in `directory` and renames it: a reader sees the old or the new, and a link is replaced.
 * 0 or an errno; then nothing is left behind. */
int write_beside(int directory, const char *name, const struct buffer *content, mode_t mode);

/* drivers.c ------------------------------------------------------------------------------------------------------ */

/* Where a kernel's modules are in the guest, followed by its release, or else. */
#define MODULES "/lib/modules/"
#define SPARE_MODULES SPARE_PLACES "modules"

/* Opens the directory of the running kernel's modules; -1 when there is none. */
int modules_open(void);
/* Once the root stands: makes the device nodes whose drivers are loaded when they are opened, and serves the kernel's
 * requests for modules. With `own_init` systemd is kept from a service that fails in images without kmod. */
void drivers_prepare(bool own_init);

/* modprobe.c ----------------------------------------------------------------------------------------------------- */

/* Loads the modules that `name` stands for, a module or an alias, with all that they need, by modules.dep, modules.alias
 * and modules.softdep (depmod(8)) of the directory `modules`. `load` gets each file (0 or an errno). 0 or an errno. */
int modprobe(int modules, const char *name, int (*load)(int modules, const char *path));
/* What the kernel runs to load a module: below /dev, which no init mounts anew. */
#define MODPROBE "/dev/.banger-modprobe"
/* That program: executes the image's kmod, where there is one, else does the above. Exit status. */
int modprobe_main(int count, char **arguments);

/* keys.c -------------------------------------------------------------------------------------------------------- */

/* Banger's own lines in `old` (with NUL) are replaced by `lines`; the others stay. The caller frees the buffer. */
void replace_managed_lines(const char *old, char **lines, struct buffer *result);
/* Puts `lines` (ends with NULL) into .ssh/authorized_keys in the directory `home`, as the user whom that belongs to: what
 * this user may have put in the way leads to nothing of another one. Links are not followed. 0 or an errno. */
int keys_write(int home, char **lines, struct failure *failure);

/* stats.c: parsers of single lines of files in /proc -------------------------------------------------------------- */

struct process {
    uint64_t flags; /* PF_... */
    int64_t tty;    /* 0: no controlling terminal */
};

enum { PROCESS_KERNEL_THREAD = 0x00200000 }; /* PF_KTHREAD in include/linux/sched.h */

/* A line of /proc/PID/stat (proc(5)). */
bool parse_process(const char *line, struct process *process);
bool process_read(int pid, struct process *process);
/* The "cpu " line of /proc/stat, in clock ticks. */
bool parse_cpu(const char *line, uint64_t *total, uint64_t *busy);
/* The bytes in a line "`name` NUMBER kB" of /proc/meminfo. */
bool parse_memory(const char *line, const char *name, uint64_t *bytes);
/* A line of /proc/diskstats, in bytes. */
bool parse_disk(const char *line, char name[64], uint64_t *read, uint64_t *written);
/* A line of /proc/net/dev, in bytes. */
bool parse_net(const char *line, char name[64], uint64_t *received, uint64_t *sent);

struct mount {
    unsigned major, minor;
    char root[1024], target[1024], fstype[64], source[1024];
};

/* A line of /proc/self/mountinfo (proc(5)), its \ooo undone. */
bool parse_mount(const char *line, struct mount *mount);

/* processes.c --------------------------------------------------------------------------------------------------- */

struct process_details {
    uint64_t parent, flags, threads;
    uint64_t used, started; /* clock ticks of CPU time, and after boot */
    uint64_t resident;      /* pages */
    char condition, name[64];
};

/* A line of /proc/PID/stat, and more of it than parse_process takes. */
bool parse_process_details(const char *line, struct process_details *details);
/* Turns words that end with NUL, `length` bytes with room for another one, into a string with spaces between them. */
void join_words(char *words, size_t length);

/* ports.c ------------------------------------------------------------------------------------------------------- */

struct listener {
    char address[INET6_ADDRSTRLEN];
    uint16_t port;
    uint64_t inode;
};

/* A line of /proc/net/{tcp,tcp6,udp,udp6}; false when it is no listening (or, udp, unconnected) socket. */
bool parse_listener(const char *line, bool udp, struct listener *listener);

#endif
