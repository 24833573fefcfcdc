/* stats: CPU, memory, load, filesystems, network and block devices of the guest, from /proc (proc(5)). */
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "system.h"

enum { SECTOR = 512, MAX_FILESYSTEMS = 64, LARGEST_ENTRY = 2048 };

bool parse_process(const char *line, struct process *process) {
    const char *rest = strrchr(line, ')'); /* the name before it may hold anything */
    return rest && sscanf(rest, ") %*c %*d %*d %*d %" SCNd64 " %*d %" SCNu64, &process->tty, &process->flags) == 2;
}

bool process_read(int pid, struct process *process) {
    char path[64], line[512];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    /* not its first line: a name may hold the end of one */
    return read_start(path, line, sizeof line) > 0 && parse_process(line, process);
}

bool parse_cpu(const char *line, uint64_t *total, uint64_t *busy) {
    /* user, nice, system, idle, iowait, irq, softirq, steal; guest time is contained in user */
    uint64_t ticks[8] = {0};
    if (strncmp(line, "cpu ", 4) != 0 ||
        sscanf(line + 4,
               "%" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64,
               &ticks[0], &ticks[1], &ticks[2], &ticks[3], &ticks[4], &ticks[5], &ticks[6], &ticks[7]) < 4)
        return false;
    *total = 0;
    for (size_t i = 0; i < 8; i++)
        *total += ticks[i];
    *busy = *total - ticks[3] - ticks[4];
    return true;
}

bool parse_memory(const char *line, const char *name, uint64_t *bytes) {
    size_t length = strlen(name);
    if (strncmp(line, name, length) != 0 || sscanf(line + length, " %" SCNu64 " kB", bytes) != 1)
        return false;
    *bytes *= 1024;
    return true;
}

bool parse_disk(const char *line, char name[64], uint64_t *read, uint64_t *written) {
    if (sscanf(line, " %*u %*u %63s %*u %*u %" SCNu64 " %*u %*u %*u %" SCNu64, name, read, written) != 3)
        return false;
    *read *= SECTOR;
    *written *= SECTOR;
    return true;
}

bool parse_net(const char *line, char name[64], uint64_t *received, uint64_t *sent) {
    return sscanf(line, " %63[^: ]: %" SCNu64 " %*u %*u %*u %*u %*u %*u %*u %" SCNu64, name, received, sent) == 3;
}

/* Undoes the \ooo of a mountinfo field, in place. */
static void unescape(char *text) {
    char *out = text;
    for (; *text; out++) {
        if (text[0] == '\\' && text[1] >= '0' && text[1] <= '3' && isdigit((unsigned char)text[2]) &&
            isdigit((unsigned char)text[3])) {
            *out = (char)((text[1] - '0') * 64 + (text[2] - '0') * 8 + (text[3] - '0'));
            text += 4;
        } else {
            *out = *text++;
        }
    }
    *out = 0;
}

bool parse_mount(const char *line, struct mount *mount) {
    if (sscanf(line, "%*u %*u %u:%u %1023s %1023s", &mount->major, &mount->minor, mount->root, mount->target) != 4)
        return false;
    const char *rest = strstr(line, " - "); /* after a varying number of optional fields */
    if (!rest || sscanf(rest, " - %63s %1023s", mount->fstype, mount->source) != 2)
        return false;
    unescape(mount->root);
    unescape(mount->target);
    unescape(mount->source);
    return true;
}

/* A reply is one frame. */
static bool has_room(const struct buffer *reply) {
    return reply->length < MAX_PAYLOAD - LARGEST_ENTRY;
}

/* Calls `use` for each line of a file. */
static void for_lines(const char *path, void (*use)(const char *line, struct buffer *reply), struct buffer *reply) {
    FILE *file = fopen(path, "re");
    if (!file)
        return;
    char *line = NULL;
    size_t size = 0;
    while (has_room(reply) && getline(&line, &size, file) > 0)
        use(line, reply);
    free(line);
    fclose(file);
}

static void put_cpu(struct buffer *reply) {
    FILE *file = fopen("/proc/stat", "re");
    if (!file)
        return;
    char *line = NULL;
    size_t size = 0;
    uint64_t total = 0, busy = 0, cpus = 0, tick_ms = 1000 / (uint64_t)sysconf(_SC_CLK_TCK);
    while (getline(&line, &size, file) > 0 && strncmp(line, "cpu", 3) == 0) {
        if (isdigit((unsigned char)line[3]))
            cpus++;
        else
            parse_cpu(line, &total, &busy);
    }
    free(line);
    fclose(file);
    put_number(reply, TAG_CPU_TOTAL, total * tick_ms);
    put_number(reply, TAG_CPU_BUSY, busy * tick_ms);
    put_number(reply, TAG_CPUS, cpus);
}

static void put_memory(const char *line, struct buffer *reply) {
    uint64_t bytes;
    if (parse_memory(line, "MemTotal:", &bytes))
        put_number(reply, TAG_MEM_TOTAL, bytes);
    else if (parse_memory(line, "MemAvailable:", &bytes))
        put_number(reply, TAG_MEM_FREE, bytes);
}

static void put_load(const char *line, struct buffer *reply) {
    unsigned whole[3], hundredths[3];
    if (sscanf(line, "%u.%u %u.%u %u.%u", &whole[0], &hundredths[0], &whole[1], &hundredths[1], &whole[2],
               &hundredths[2]) == 6)
        for (size_t i = 0; i < 3; i++)
            put_number(reply, TAG_LOAD, whole[i] * 100 + hundredths[i]);
}

static void put_processes(struct buffer *reply) {
    DIR *processes = opendir("/proc");
    if (!processes)
        return;
    uint64_t count = 0;
    struct dirent *entry;
    while ((entry = readdir(processes))) {
        struct process process;
        int pid = atoi(entry->d_name);
        count += pid > 0 && process_read(pid, &process) && !(process.flags & PROCESS_KERNEL_THREAD);
    }
    closedir(processes);
    put_number(reply, TAG_PROCESSES, count);
}

static void put_filesystem(const char *target, struct buffer *reply) {
    struct statvfs status;
    if (statvfs(target, &status) < 0)
        return;
    struct buffer nested = {0};
    put_string(&nested, TAG_TARGET, target);
    put_number(&nested, TAG_SIZE, (uint64_t)status.f_blocks * status.f_frsize);
    put_number(&nested, TAG_USED, (uint64_t)(status.f_blocks - status.f_bfree) * status.f_frsize);
    put_nested(reply, TAG_FILESYSTEM, &nested);
}

/* The root, and each disk where it is mounted whole: bind mounts and read-only images say nothing new. */
static void put_filesystems(struct buffer *reply) {
    FILE *file = fopen("/proc/self/mountinfo", "re");
    if (!file)
        return;
    char *line = NULL;
    size_t size = 0, count = 0;
    unsigned seen[MAX_FILESYSTEMS][2];
    put_filesystem("/", reply);
    while (count < MAX_FILESYSTEMS && has_room(reply) && getline(&line, &size, file) > 0) {
        struct mount mount;
        if (!parse_mount(line, &mount) || strncmp(mount.source, "/dev/", 5) != 0 || strcmp(mount.root, "/") != 0 ||
            strcmp(mount.target, "/") == 0 || strcmp(mount.fstype, "squashfs") == 0)
            continue;
        size_t i = 0;
        while (i < count && (seen[i][0] != mount.major || seen[i][1] != mount.minor))
            i++;
        if (i < count)
            continue;
        seen[count][0] = mount.major;
        seen[count++][1] = mount.minor;
        put_filesystem(mount.target, reply);
    }
    free(line);
    fclose(file);
}

static void put_net(const char *line, struct buffer *reply) {
    char name[64];
    uint64_t received, sent;
    if (!parse_net(line, name, &received, &sent) || strcmp(name, "lo") == 0)
        return;
    struct buffer nested = {0};
    put_string(&nested, TAG_NAME, name);
    put_number(&nested, TAG_RECEIVED, received);
    put_number(&nested, TAG_SENT, sent);
    put_nested(reply, TAG_NET, &nested);
}

static void put_block(const char *line, struct buffer *reply) {
    char name[64], path[128];
    uint64_t read, written;
    if (!parse_disk(line, name, &read, &written))
        return;
    snprintf(path, sizeof path, "/sys/block/%s/device", name); /* neither partitions nor loop devices have it */
    if (access(path, F_OK) < 0)
        return;
    struct buffer nested = {0};
    put_string(&nested, TAG_NAME, name);
    put_number(&nested, TAG_READ, read);
    put_number(&nested, TAG_WRITTEN, written);
    put_nested(reply, TAG_BLOCK, &nested);
}

int call_stats(struct fields *request, struct buffer *reply, struct failure *failure) {
    (void)request;
    put_cpu(reply);
    for_lines("/proc/meminfo", put_memory, reply);
    for_lines("/proc/loadavg", put_load, reply);
    put_processes(reply);
    put_filesystems(reply);
    for_lines("/proc/net/dev", put_net, reply);
    for_lines("/proc/diskstats", put_block, reply);
    return reply->failed ? fail(failure, ENOMEM, "no memory for the statistics") : 0;
}
