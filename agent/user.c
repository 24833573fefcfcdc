/* Accounts from the guest's /etc/passwd and /etc/group (passwd(5), group(5)), read without libc's NSS. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"

enum { DATABASE_LIMIT = 8 * 1024 * 1024 };

/* The whole file as a string, to be freed; NULL when it is not a plain file of a sane size. The image owns it, so it
 * may be a fifo, too. */
static char *read_database(const char *path) {
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    struct stat status;
    char *text = NULL;
    if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_size <= DATABASE_LIMIT)
        text = malloc((size_t)status.st_size + 1);
    size_t length = 0;
    while (text != NULL && length < (size_t)status.st_size) {
        ssize_t count = read(fd, text + length, (size_t)status.st_size - length);
        if (count <= 0)
            break;
        length += (size_t)count;
    }
    if (text != NULL)
        text[length] = 0;
    close(fd);
    return text;
}

/* Splits the line at *rest into `count` parts at colons, "" where it has fewer, and moves on to the next line; false at
 * the end. Empty lines, comments and the entries that name other databases (+ and -, nsswitch.conf(5)) are skipped. */
static bool next_entry(char **rest, char *parts[], int count) {
    static char missing[] = "";
    char *line;
    while ((line = strsep(rest, "\n")) != NULL) {
        line += strspn(line, " \t\r");
        for (size_t length = strlen(line); length > 0 && strchr(" \t\r", line[length - 1]) != NULL;)
            line[--length] = 0;
        if (*line == 0 || strchr(":#+-", *line) != NULL)
            continue;
        for (int i = 0; i < count; i++)
            parts[i] = line != NULL ? strsep(&line, ":") : missing;
        return true;
    }
    return false;
}

/* Ids are 32 bits, and the highest one means "unchanged" to the kernel. */
static bool parse_id(const char *text, uint32_t *id) {
    uint64_t value = 0;
    if (*text == 0)
        return false;
    for (; *text != 0; text++) {
        if (*text < '0' || *text > '9')
            return false;
        value = value * 10 + (uint64_t)(*text - '0');
        if (value >= UINT32_MAX)
            return false;
    }
    *id = (uint32_t)value;
    return true;
}

static void copy(char *to, size_t size, const char *text, const char *otherwise) {
    snprintf(to, size, "%s", *text != 0 && strlen(text) < size ? text : otherwise);
}

/* An id of an entry; one that is left out is 0, as container engines have it. */
static bool entry_id(const char *text, uint32_t *id) {
    *id = 0;
    return *text == 0 || parse_id(text, id);
}

/* Fills the account from the first entry with that number, or with that name if it is none. */
static bool find_passwd(const char *user, struct account *account) {
    char *text = read_database("/etc/passwd");
    uint32_t wanted = 0;
    bool numeric = parse_id(user, &wanted), found = false;
    char *rest = text, *parts[7];
    while (text != NULL && !found && next_entry(&rest, parts, 7)) {
        uint32_t uid, gid;
        if (!entry_id(parts[2], &uid) || !entry_id(parts[3], &gid) || strlen(parts[0]) >= sizeof account->name)
            continue;
        found = numeric ? uid == wanted : strcmp(parts[0], user) == 0;
        if (!found)
            continue;
        account->uid = uid;
        account->gid = gid;
        copy(account->name, sizeof account->name, parts[0], "");
        copy(account->home, sizeof account->home, parts[5], "/");
        copy(account->shell, sizeof account->shell, parts[6], "/bin/sh");
    }
    free(text);
    return found;
}

static bool find_group(const char *group, gid_t *gid) {
    if (parse_id(group, gid))
        return true;
    char *text = read_database("/etc/group");
    char *rest = text, *parts[4];
    bool found = false;
    while (text != NULL && !found && next_entry(&rest, parts, 4))
        found = strcmp(parts[0], group) == 0 && entry_id(parts[2], gid);
    free(text);
    return found;
}

static bool is_member(char *members, const char *name) {
    char *member;
    while ((member = strsep(&members, ",")) != NULL)
        if (strcmp(member, name) == 0)
            return true;
    return false;
}

/* Appends the groups that list the account's name. */
static void add_groups(struct account *account) {
    char *text = read_database("/etc/group");
    char *rest = text, *parts[4];
    uint32_t gid;
    size_t limit = sizeof account->groups / sizeof account->groups[0];
    while (text != NULL && account->group_count < limit && next_entry(&rest, parts, 4))
        if (entry_id(parts[2], &gid) && gid != account->gid && is_member(parts[3], account->name))
            account->groups[account->group_count++] = gid;
    free(text);
}

/* For a user without an entry: any number, and root, which must work in images that have no passwd at all. */
static bool assume(const char *user, struct account *account) {
    bool root = strcmp(user, "root") == 0 || strcmp(user, "0") == 0;
    if (!root && !parse_id(user, &account->uid))
        return false;
    snprintf(account->name, sizeof account->name, "%s", root ? "root" : user);
    strcpy(account->home, root ? "/root" : "/");
    strcpy(account->shell, "/bin/sh");
    return true;
}

int account_find(const char *user, struct account *account, struct failure *failure) {
    memset(account, 0, sizeof *account);
    char name[sizeof account->name];
    const char *group = strchr(user, ':');
    size_t length = group != NULL ? (size_t)(group - user) : strlen(user);
    if (strcmp(user, ":") == 0 || *user == 0 || length >= sizeof name)
        return fail(failure, EINVAL, "'%.80s' is not a user: give NAME, UID, NAME:GROUP or UID:GID", user);
    /* Either half may be empty: ":GROUP" is root in that group, "NAME:" the same as NAME. */
    snprintf(name, sizeof name, "%.*s", length > 0 ? (int)length : 4, length > 0 ? user : "root");
    if (group != NULL && group[1] == 0)
        group = NULL;
    if (!find_passwd(name, account) && !assume(name, account))
        return fail(failure, ESRCH, "there is no user '%s' in the guest's /etc/passwd", name);
    if (group != NULL && !find_group(group + 1, &account->gid))
        return fail(failure, ESRCH, "there is no group '%.80s' in the guest's /etc/group", group + 1);
    account->groups[account->group_count++] = account->gid;
    if (group == NULL)
        add_groups(account);
    return 0;
}
