/* Constants of the guest protocol, version 2; docs/guest-protocol.md says what they mean. */
#ifndef BANGER_PROTOCOL_H
#define BANGER_PROTOCOL_H

#include <stdint.h>

/* All integers are little-endian.
 *
 * Frame:  offset 0  'B' 'G'
 *                2  u8  type
 *                3  u8  stream (DATA, END), else 0
 *                4  u32 channel (0: the session itself; top bit set: opened by the guest)
 *                8  u32 length of the payload, at most MAX_PAYLOAD
 *               12  u32 check = crc32(bytes 0..11) | 1   (CRC-32 of IEEE 802.3, as in zlib)
 *               16  payload
 *       16 + length  u32 check, again: a frame that was cut off and completed by zeros does not end with it
 * Zero bytes between frames are skipped.
 */
enum {
    OLDEST_VERSION = 1, /* without PART */
    PROTOCOL_VERSION = 2,
    HEADER_SIZE = 16,
    TRAILER_SIZE = 4,
    MAX_FRAME = 65536,
    MAX_PAYLOAD = MAX_FRAME - HEADER_SIZE - TRAILER_SIZE,
    MAX_REQUEST = 4 * 1024 * 1024, /* payload of an OPEN with its PARTs: twice what Linux takes of a command's words */
    HELLO_SIZE = 32,
    NONCE_SIZE = 16,
    INITIAL_WINDOW = 512 * 1024, /* bytes of DATA either side may send on a new channel before WINDOW arrives */
    MAX_CHANNELS = 256,
};

/* Where the agent and the host meet: two virtio-serial ports or, where there are none, two ports of vsock; on the first
 * of those the agent listens, on the second the host. */
#define AGENT_PORT "banger.agent"
#define LOG_PORT "banger.log"
enum { VSOCK_AGENT_PORT = 1024, VSOCK_LOG_PORT = 1025 };

/* On the console, behind "banger: ", of a guest that can only reset and is about to do so in order to power off. */
#define POWER_OFF_NOTICE "powering off by a reset"

enum frame_type {
    FRAME_HELLO = 1,  /* nonce[16], u16 oldest version, u16 newest version, 12 bytes of zeros; channel 0 */
    FRAME_OPEN = 2,   /* u16 kind (enum open_kind), then fields */
    FRAME_REPLY = 3,  /* fields; ends the channel of a call, begins that of a stream */
    FRAME_ERROR = 4,  /* u32 Linux errno, then a message in UTF-8; ends the channel */
    FRAME_DATA = 5,   /* bytes of one stream */
    FRAME_END = 6,    /* no payload: the sender sends no more DATA on this stream */
    FRAME_WINDOW = 7, /* u32: so many more bytes of DATA may be sent on this channel */
    FRAME_SIGNAL = 8, /* u32 Linux signal number, to the process group of an exec */
    FRAME_RESIZE = 9, /* u16 rows, u16 columns */
    FRAME_EXIT = 10,  /* u32 0: exited, 1: ended by a signal; u32 status or signal; the last frame before CLOSE */
    FRAME_CLOSE = 11, /* no payload: the sender has forgotten the channel; answered by CLOSE unless already sent */
    FRAME_PART = 12,  /* the next bytes of the payload of the OPEN that comes for this channel; from version 2 on */
};

/* Streams of a channel. */
enum { STREAM_MAIN = 0, STREAM_STDERR = 1 };

enum open_kind {
    /* streams: REPLY, then DATA both ways */
    OPEN_EXEC = 1,
    OPEN_WRITE_TREE = 2, /* PATH, FLAGS: the host sends a tar stream and END; EXIT when it is extracted */
    OPEN_READ_TREE = 3,  /* PATH, FLAGS: the agent sends a tar stream, END, EXIT */
    OPEN_DIAL = 4,       /* ADDRESS (default 127.0.0.1), PORT: a TCP connection in the guest */
    OPEN_WAIT = 5,       /* EXIT when the main command has ended, at once if it already has */
    /* calls: REPLY or ERROR ends the channel */
    CALL_CONFIGURE = 16,
    CALL_STAT = 17,
    CALL_HEALTH = 18,
    CALL_STATS = 19,
    CALL_PORTS = 20,
    CALL_CLOCK = 21,    /* TIME: set the wall clock */
    CALL_RESEED = 22,   /* ENTROPY: mix it into the kernel's random pool and reseed */
    CALL_SHUTDOWN = 23, /* MODE, GRACE, SIGNAL; REPLY comes before the guest goes down */
    CALL_GROW = 24,     /* ROLE: grow the filesystem of this disk to the disk's SIZE, which is replied */
    CALL_PROCESSES = 25, /* PID: the lowest to begin with, absent: the first; replied are UPTIME, PROCESS*, MORE */
};

/* A field is u16 tag, u32 length, value. Numbers are u64. "nested": the value is fields again. A tag may repeat where
 * the comment has a *. Unknown tags are ignored. Strings hold no NUL. */
enum tag {
    TAG_ARG = 1,       /* * exec: one word of argv; none: the user's login shell. configure: of what INIT is decided by */
    TAG_ENV = 2,       /* * exec, configure: NAME=value */
    TAG_CWD = 3,       /* exec: default is the user's home directory, or /. configure: where ARG starts, default / */
    TAG_USER = 4,      /* exec: NAME, UID, NAME:GROUP or UID:GID; default root. write tree: owner of all that is written.
                        * process: NAME, or UID where that has none */
    TAG_TERMINAL = 5,  /* exec: a pty of (rows << 16 | columns) */
    TAG_FLAGS = 6,     /* exec, trees: bits below */
    TAG_PID = 7,       /* exec reply, health, listener, process: process id; processes: the lowest that is wanted */
    TAG_PATH = 8,      /* trees, stat */
    TAG_ADDRESS = 9,   /* dial; listener: numeric address */
    TAG_PORT = 10,     /* dial; listener */
    TAG_TIME = 11,     /* clock: ns since 1970 */
    TAG_ENTROPY = 12,  /* reseed: bytes */
    TAG_MODE = 13,     /* shutdown: 0 power off, 1 reboot; stat: st_mode */
    TAG_GRACE = 14,    /* shutdown: ms between SIGTERM and SIGKILL */
    TAG_SIGNAL = 15,   /* shutdown: Linux signal number that the main command gets first; 0 or absent: none */

    TAG_HOSTNAME = 20,   /* configure */
    TAG_INTERFACE = 21,  /* * configure, nested: MAC, CIDR*, GATEWAY*, MTU */
    TAG_MAC = 22,        /* 6 bytes */
    TAG_CIDR = 23,       /* * "10.0.2.15/24" */
    TAG_GATEWAY = 24,    /* * numeric address of the default route */
    TAG_MTU = 25,
    TAG_NAMESERVER = 26, /* * configure */
    TAG_SEARCH = 27,     /* * configure: DNS search domain */
    TAG_HOST = 28,       /* * configure: a line for /etc/hosts, "ADDRESS NAME..." */
    TAG_KEY = 29,        /* * configure: a line for root's authorized_keys */
    TAG_DISK = 30,       /* * configure, nested: SERIAL, ROLE, FSTYPE, TARGET, READONLY */
    TAG_SERIAL = 31,
    TAG_ROLE = 32,       /* enum disk_role */
    TAG_FSTYPE = 33,
    TAG_TARGET = 34,
    TAG_READONLY = 35,   /* number, 0 or 1 */
    TAG_INIT = 36,       /* configure: enum init_mode; configure reply: what was chosen, never INIT_AUTO */
    TAG_VOLUME = 37,     /* * configure: directory that lies on the overlay disk itself, not on overlayfs */
    TAG_DIRECTORY = 38,  /* * configure: directory that is made when it is missing */

    TAG_UID = 40,        /* stat */
    TAG_GID = 41,        /* stat */
    TAG_SIZE = 42,       /* stat, grow: bytes */
    TAG_MTIME = 43,      /* stat: ns since 1970 */
    TAG_LINK = 44,       /* stat: target of a symbolic link */

    TAG_STATE = 50,      /* health: enum guest_state */
    TAG_UPTIME = 51,     /* health, processes: ms */
    TAG_BOOT_ID = 52,    /* health: /proc/sys/kernel/random/boot_id */
    TAG_AGENT = 53,      /* health: version string of the agent */
    TAG_EXITED = 54,     /* health: main command: absent while there is none or it runs, else kind << 32 | value as in EXIT */
    TAG_RELEASE = 55,    /* health: uname -r */

    TAG_CPU_TOTAL = 60,  /* stats: ms of all CPUs since boot */
    TAG_CPU_BUSY = 61,   /* stats: ms not idle and not waiting for I/O; process: ms that it has used */
    TAG_CPUS = 62,       /* stats: online CPUs */
    TAG_MEM_TOTAL = 63,  /* stats: bytes */
    TAG_MEM_FREE = 64,   /* stats: bytes available to programs (MemAvailable) */
    TAG_LOAD = 65,       /* * stats: load average x 100 of 1, 5, 15 minutes */
    TAG_FILESYSTEM = 66, /* * stats, nested: TARGET, SIZE, USED */
    TAG_USED = 67,
    TAG_NET = 68,        /* * stats, nested: NAME, RECEIVED, SENT */
    TAG_NAME = 69,       /* net: interface; listener, process: name of the process */
    TAG_RECEIVED = 70,   /* bytes */
    TAG_SENT = 71,       /* bytes */
    TAG_BLOCK = 72,      /* * stats, nested: NAME, READ, WRITTEN */
    TAG_READ = 73,       /* bytes */
    TAG_WRITTEN = 74,    /* bytes */
    TAG_PROCESSES = 75,  /* stats: number of processes */

    TAG_LISTENER = 80,   /* * ports, nested: PROTOCOL, ADDRESS, PORT, PID, NAME */
    TAG_PROTOCOL = 81,   /* "tcp" or "udp" */

    /* * processes, nested: PID, PARENT, USER, CONDITION, CPU_BUSY, RESIDENT, THREADS, STARTED, NAME, KERNEL, COMMAND */
    TAG_PROCESS = 84,
    TAG_PARENT = 85,     /* process id */
    TAG_CONDITION = 86,  /* one letter: R, S, D, Z, ... of proc(5) */
    TAG_RESIDENT = 87,   /* bytes of memory */
    TAG_THREADS = 88,
    TAG_STARTED = 89,    /* ms after boot, as UPTIME */
    TAG_KERNEL = 90,     /* 1: a thread of the kernel; absent: none */
    TAG_COMMAND = 91,    /* the words of the command line, spaces between them, cut off; absent when there is none */
    TAG_MORE = 92,       /* processes: the PID to ask for next; absent: these were the last */
};

enum exec_flags {
    EXEC_DETACHED = 1, /* no channel data: standard input is /dev/null, EXIT is not awaited, survives the session */
    EXEC_LOG = 2,      /* its output is also written to the log port */
    EXEC_MAIN = 4,     /* the main command: its end is kept for WAIT and HEALTH */
    EXEC_INIT = 8,     /* it is PID 1 of a PID namespace, which later commands and trees join while it lives */
};

enum tree_flags {
    TREE_FOLLOW = 1,   /* read: PATH itself may be a symbolic link and is followed */
    TREE_CONTENTS = 2, /* read: the members of the directory PATH, not PATH itself */
};

enum disk_role {
    ROLE_IMAGE = 1,   /* the lower layer of the root */
    ROLE_OVERLAY = 2, /* ext4 with the upper layer */
    ROLE_HOME = 3,    /* ext4, mounted at /root */
    ROLE_MODULES = 4, /* squashfs, mounted at /lib/modules/<uname -r> */
    ROLE_OTHER = 5,   /* mounted at TARGET */
};

enum init_mode {
    INIT_AGENT = 0,   /* the agent stays PID 1 */
    INIT_IMAGE = 1,   /* an init of the image: ARG, or without them what stands at an init's place */
    INIT_AUTO = 2,    /* as ARG turns out to be; from version 2 on */
    INIT_COMMAND = 3, /* the agent, and the main command is to be run with EXEC_INIT; from version 2 on */
};

enum guest_state {
    STATE_WAITING = 0, /* not configured yet */
    STATE_RUNNING = 1,
    STATE_STOPPING = 2,
};

/* The log port carries records: u8 stream (1 stdout, 2 stderr), u24 length, bytes. */

#endif
