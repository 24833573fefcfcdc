/* Banger's own lines in an authorized_keys, written as the user whose home directory it lies in. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <unistd.h>

#include "system.h"

#define NAME "authorized_keys"
#define MANAGED_BEGIN "# banger: the keys from here on are written by banger"
#define MANAGED_END "# banger: your own keys may follow"

static void append_text(struct buffer *buffer, const char *text) {
    buffer_append(buffer, text, strlen(text));
}

void replace_managed_lines(const char *old, char **lines, struct buffer *result) {
    bool managed = false;
    for (size_t length; *old; old += length) {
        length = strcspn(old, "\n");
        bool begins = length == strlen(MANAGED_BEGIN) && memcmp(old, MANAGED_BEGIN, length) == 0;
        bool ends = length == strlen(MANAGED_END) && memcmp(old, MANAGED_END, length) == 0;
        managed = (managed || begins) && !ends;
        if (!managed && !ends) {
            buffer_append(result, old, length);
            buffer_append(result, "\n", 1);
        }
        length += old[length] == '\n';
    }
    append_text(result, MANAGED_BEGIN "\n");
    for (; lines && *lines; lines++) {
        append_text(result, *lines);
        append_text(result, "\n");
    }
    append_text(result, MANAGED_END "\n");
}

/* Appends what the file holds, nothing when there is none, and a NUL. */
static int read_old(int directory, struct buffer *content, struct failure *failure) {
    enum { LIMIT = 1 << 20 };
    int fd = openat(directory, NAME, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    struct stat status;
    char part[4096];
    ssize_t length = 0;
    int code = 0;
    if (fd < 0 && errno != ENOENT)
        code = fail(failure, errno, "cannot read .ssh/" NAME ": %s", strerror(errno));
    else if (fd >= 0 && (fstat(fd, &status) < 0 || !S_ISREG(status.st_mode)))
        code = fail(failure, EINVAL, ".ssh/" NAME " is no regular file");
    while (fd >= 0 && !code && content->length < LIMIT && (length = read(fd, part, sizeof part)) > 0)
        buffer_append(content, part, (size_t)length);
    if (!code && (length < 0 || content->length >= LIMIT))
        code = fail(failure, EFBIG, ".ssh/" NAME " is larger than 1 MiB, or cannot be read");
    if (fd >= 0)
        close(fd);
    buffer_append(content, "", 1);
    return code;
}

static int write_below(int home, char **lines, struct failure *failure) {
    enum { FLAGS = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC };
    int directory = openat(home, ".ssh", FLAGS);
    if (directory < 0 && errno == ENOENT && mkdirat(home, ".ssh", 0700) == 0)
        directory = openat(home, ".ssh", FLAGS);
    if (directory < 0)
        return fail(failure, errno, "cannot open .ssh: %s", strerror(errno));
    struct stat status;
    if (fstat(directory, &status) == 0 && (status.st_mode & 07777) != 0700)
        fchmod(directory, 0700);
    struct buffer old = {0}, fresh = {0};
    int code = read_old(directory, &old, failure);
    if (!code && !old.failed)
        replace_managed_lines((const char *)old.data, lines, &fresh);
    if (!code && (old.failed || fresh.failed))
        code = fail(failure, ENOMEM, "no memory for .ssh/" NAME);
    /* `old` ends with a NUL */
    if (!code && (fresh.length + 1 != old.length || memcmp(fresh.data, old.data, fresh.length) != 0) &&
        (code = write_beside(directory, NAME, &fresh, 0600)))
        fail(failure, code, "cannot write .ssh/" NAME ": %s", strerror(code));
    buffer_free(&old);
    buffer_free(&fresh);
    close(directory);
    return code;
}

int keys_write(int home, char **lines, struct failure *failure) {
    struct stat status;
    if (fstat(home, &status) < 0)
        return fail(failure, errno, "cannot read the home directory: %s", strerror(errno));
    uid_t uid = geteuid();
    gid_t gid = getegid();
    setfsgid(status.st_gid);
    setfsuid(status.st_uid);
    /* they tell of no error but by what they have not changed */
    int code = (uid_t)setfsuid((uid_t)-1) == status.st_uid && (gid_t)setfsgid((gid_t)-1) == status.st_gid
                   ? write_below(home, lines, failure)
                   : fail(failure, EPERM, "cannot become the owner of the home directory");
    setfsuid(uid);
    setfsgid(gid);
    return code;
}
