/* CALL_STAT: what kind of thing stands at a path of the guest. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "namespace.h"
#include "tar.h"

int call_stat(struct fields *request, struct buffer *reply, struct failure *failure) {
    uint16_t tag;
    struct bytes value;
    uint64_t flags = 0;
    char *path = NULL, target[PATH_MAX];
    bool bad = false;
    while (!bad && fields_next(request, &tag, &value)) {
        if (tag == TAG_PATH) {
            free(path);
            path = value_string(value, PATH_MAX - 1);
            bad = !path;
        } else if (tag == TAG_FLAGS) {
            bad = !value_number(value, &flags);
        }
    }
    if (bad || request->bad || !path) {
        free(path);
        return fail(failure, EINVAL, "stat needs one path of at most %d bytes", PATH_MAX - 1);
    }
    struct stat status;
    ssize_t length = 0;
    int fd = namespace_open(path, O_PATH | (flags & TREE_FOLLOW ? 0 : O_NOFOLLOW));
    int code = fd < 0 || fstat(fd, &status) < 0 ? errno : 0;
    if (!code && S_ISLNK(status.st_mode) && (length = readlinkat(fd, "", target, sizeof target)) < 0)
        code = errno;
    if (fd >= 0)
        close(fd);
    if (code) {
        fail(failure, code, "cannot stat %s: %s", SHOW(path), strerror(code));
    } else {
        put_number(reply, TAG_MODE, status.st_mode);
        put_number(reply, TAG_UID, status.st_uid);
        put_number(reply, TAG_GID, status.st_gid);
        put_number(reply, TAG_SIZE, (uint64_t)status.st_size);
        put_number(reply, TAG_MTIME,
                   (uint64_t)status.st_mtim.tv_sec * 1000000000 + (uint64_t)status.st_mtim.tv_nsec);
        if (S_ISLNK(status.st_mode))
            put_bytes(reply, TAG_LINK, target, (size_t)length);
    }
    free(path);
    return code;
}
