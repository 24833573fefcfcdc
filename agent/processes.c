/* processes: what runs in the guest, a page at a time, from /proc (proc(5)). */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "system.h"

/* A page ends early enough for others to have their turn, and for the longest entry to fit into its frame. */
enum { AT_ONCE = 256, LARGEST_ENTRY = 1280, COMMAND_SIZE = 512, KNOWN_USERS = 32 };

struct user {
    uid_t uid;
    char name[sizeof((struct account *)0)->name];
};

/* The users of one page: their file is read once for each. */
struct users {
    struct user known[KNOWN_USERS];
    size_t count;
};

bool parse_process_details(const char *line, struct process_details *details) {
    const char *name = strchr(line, '('), *rest = strrchr(line, ')'); /* the name between them may hold anything */
    if (!name || !rest || rest < name)
        return false;
    size_t length = (size_t)(rest - name - 1);
    if (length >= sizeof details->name)
        length = sizeof details->name - 1;
    memcpy(details->name, name + 1, length);
    details->name[length] = 0;
    uint64_t user, system;
    if (sscanf(rest,
               ") %c %" SCNu64 " %*d %*d %*d %*d %" SCNu64 " %*u %*u %*u %*u %" SCNu64 " %" SCNu64
               " %*d %*d %*d %*d %" SCNu64 " %*d %" SCNu64 " %*u %" SCNu64,
               &details->condition, &details->parent, &details->flags, &user, &system, &details->threads,
               &details->started, &details->resident) != 8)
        return false;
    details->used = user + system;
    return true;
}

void join_words(char *words, size_t length) {
    while (length > 0 && words[length - 1] == 0)
        length--;
    for (size_t i = 0; i < length; i++)
        if (words[i] == 0)
            words[i] = ' ';
    words[length] = 0;
}

/* The command line as far as it fits; empty for threads of the kernel and for what has ended. */
static void read_command(int pid, char command[COMMAND_SIZE]) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/cmdline", pid);
    ssize_t length = read_start(path, command, COMMAND_SIZE);
    join_words(command, length > 0 ? (size_t)length : 0);
}

/* The name of a user, or the number where the guest's passwd has none. */
static const char *user_name(struct users *users, uid_t uid) {
    for (size_t i = 0; i < users->count; i++)
        if (users->known[i].uid == uid)
            return users->known[i].name;
    /* when there are too many, the last place is used again and again */
    struct user *user = &users->known[users->count < KNOWN_USERS ? users->count++ : KNOWN_USERS - 1];
    struct account account;
    struct failure failure;
    char number[16];
    snprintf(number, sizeof number, "%u", uid);
    user->uid = uid;
    bool found = account_find(number, &account, &failure) == 0;
    snprintf(user->name, sizeof user->name, "%s", found ? account.name : number);
    return user->name;
}

/* Appends a process, unless it has ended. */
static void put_process(struct buffer *reply, int pid, struct users *users) {
    char path[64], line[512], command[COMMAND_SIZE] = "";
    struct process_details details;
    struct stat status; /* its owner is the effective user, whatever the process permits */
    snprintf(path, sizeof path, "/proc/%d", pid);
    if (stat(path, &status) < 0)
        return;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    if (read_start(path, line, sizeof line) <= 0 || !parse_process_details(line, &details))
        return;
    uint64_t tick_ms = 1000 / (uint64_t)sysconf(_SC_CLK_TCK);
    struct buffer nested = {0};
    put_number(&nested, TAG_PID, (uint64_t)pid);
    put_number(&nested, TAG_PARENT, details.parent);
    put_string(&nested, TAG_USER, user_name(users, status.st_uid));
    put_bytes(&nested, TAG_CONDITION, &details.condition, 1);
    put_number(&nested, TAG_CPU_BUSY, details.used * tick_ms);
    put_number(&nested, TAG_RESIDENT, details.resident * (uint64_t)sysconf(_SC_PAGESIZE));
    put_number(&nested, TAG_THREADS, details.threads);
    put_number(&nested, TAG_STARTED, details.started * tick_ms);
    put_string(&nested, TAG_NAME, details.name);
    if (details.flags & PROCESS_KERNEL_THREAD)
        put_number(&nested, TAG_KERNEL, 1);
    else
        read_command(pid, command);
    if (*command)
        put_string(&nested, TAG_COMMAND, command);
    put_nested(reply, TAG_PROCESS, &nested);
}

static int read_request(struct fields *request, uint64_t *first, struct failure *failure) {
    uint16_t tag;
    struct bytes value;
    while (fields_next(request, &tag, &value))
        if (tag == TAG_PID && !value_number(value, first))
            return fail(failure, EINVAL, "the process to begin with is a number");
    return 0;
}

int call_processes(struct fields *request, struct buffer *reply, struct failure *failure) {
    uint64_t first = 0;
    if (read_request(request, &first, failure) != 0)
        return failure->code;
    DIR *processes = opendir("/proc");
    if (!processes)
        return fail(failure, errno, "cannot open /proc: %s", strerror(errno));
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    put_number(reply, TAG_UPTIME, (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000);
    struct users users = {.count = 0};
    struct dirent *entry;
    size_t count = 0;
    while ((entry = readdir(processes))) { /* in ascending order: next_tgid() in fs/proc/base.c of Linux */
        int pid = atoi(entry->d_name);
        if (pid <= 0 || (uint64_t)pid < first)
            continue;
        if (count++ == AT_ONCE || reply->length > MAX_PAYLOAD - LARGEST_ENTRY) {
            put_number(reply, TAG_MORE, (uint64_t)pid);
            break;
        }
        put_process(reply, pid, &users);
    }
    closedir(processes);
    return reply->failed ? fail(failure, ENOMEM, "no memory for the list of processes") : 0;
}
