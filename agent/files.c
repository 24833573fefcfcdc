/* Files that the agent gives the guest for its convenience: whatever an image or a user has made of their places, the
 * guest starts. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "beneath.h"
#include "system.h"

#define SOURCES "/run/banger"

/* The files of /run that are mounted, so that a later content goes into them. */
static struct bound {
    dev_t device;
    ino_t inode;
} bound[8];
static size_t bound_count;

static bool write_whole(int fd, const struct buffer *content) {
    size_t done = 0;
    ssize_t written = 0;
    while (done < content->length && (written = pwrite(fd, content->data + done, content->length - done, (off_t)done)) > 0)
        done += (size_t)written;
    return done == content->length;
}

int write_beside(int directory, const char *name, const struct buffer *content, mode_t mode) {
    char fresh[NAME_MAX + 1];
    if (content->failed || snprintf(fresh, sizeof fresh, "%s.banger-new", name) >= (int)sizeof fresh)
        return content->failed ? ENOMEM : ENAMETOOLONG;
    unlinkat(directory, fresh, 0);
    int fd = openat(directory, fresh, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
    if (fd < 0)
        return errno;
    bool good = write_whole(fd, content) && fchmod(fd, mode) == 0 && renameat(directory, fresh, directory, name) == 0;
    int code = good ? 0 : errno;
    close(fd);
    if (!good)
        unlinkat(directory, fresh, 0);
    return code;
}

/* True when a file that was mounted at `path` is still there and has the content now. */
static bool write_bound(const char *path, const struct buffer *content) {
    struct stat status;
    int fd = open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    bool ours = false;
    if (fd >= 0 && fstat(fd, &status) == 0)
        for (size_t i = 0; i < bound_count; i++)
            ours = ours || (status.st_dev == bound[i].device && status.st_ino == bound[i].inode);
    bool good = ours && write_whole(fd, content) && ftruncate(fd, (off_t)content->length) == 0;
    if (fd >= 0)
        close(fd);
    return good;
}

/* Mounts a file of `sources` on what the path leads to, which is made, empty, when it is missing. */
static int bind_file(int root, int sources, const char *name, const char *path) {
    char leaf[NAME_MAX + 1], source[64], target[64];
    struct stat status, mounted;
    int parent = open_parent_in_root(root, path, leaf);
    int place = parent < 0 ? -1 : openat(parent, leaf, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (place < 0 && parent >= 0 && errno == ENOENT) {
        close(openat(parent, leaf, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
        place = openat(parent, leaf, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    }
    int file = openat(sources, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    int code = place < 0 || file < 0 || fstat(place, &mounted) < 0 || fstat(file, &status) < 0 ? errno : 0;
    if (!code && !S_ISREG(mounted.st_mode))
        code = S_ISDIR(mounted.st_mode) ? EISDIR : EINVAL;
    snprintf(source, sizeof source, "/proc/self/fd/%d", file);
    snprintf(target, sizeof target, "/proc/self/fd/%d", place);
    if (!code && mount(source, target, NULL, MS_BIND, NULL) < 0)
        code = errno;
    if (!code && bound_count < sizeof bound / sizeof *bound)
        bound[bound_count++] = (struct bound){status.st_dev, status.st_ino};
    int opened[] = {parent, place, file};
    for (size_t i = 0; i < sizeof opened / sizeof *opened; i++)
        if (opened[i] >= 0)
            close(opened[i]);
    return code;
}

/* The content in a file of /run, mounted at the path; an errno when that does not work either. */
static int provide_mount(int root, const char *path, const char *name, const struct buffer *content) {
    struct failure failure;
    int sources = directory_open(root, SOURCES, &failure);
    if (sources < 0)
        return failure.code;
    int code = write_beside(sources, name, content, 0644);
    if (!code)
        code = bind_file(root, sources, name, path);
    close(sources);
    return code;
}

void provide_file(const char *path, const struct buffer *content) {
    const char *name = strrchr(path, '/') + 1;
    char parent[PATH_MAX];
    struct failure failure;
    if (write_bound(path, content))
        return;
    snprintf(parent, sizeof parent, "%.*s", (int)(name - path), path);
    int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int directory = directory_open(root, parent, &failure);
    int code = directory < 0 ? failure.code : write_beside(directory, name, content, 0644);
    if (code && directory >= 0)
        fail(&failure, code, "cannot write %s: %s", path, strerror(code));
    /* what somebody else has mounted there stays */
    if (code && (code == EBUSY || provide_mount(root, path, name, content)))
        console_print("%s", failure.message);
    else if (code)
        console_print("%s; a file of " SOURCES " is mounted there", failure.message);
    if (directory >= 0)
        close(directory);
    close(root);
}
