/* Copies directory trees inside the guest: the first content of home disks and volumes. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "system.h"

enum { MAX_DEPTH = 200 }; /* directories within each other: two descriptors each */

/* Marks a home disk: "seeding" while the image's /root is being copied to it, then "ready". */
#define HOME_MARK "trusted.banger.home"

struct link {
    dev_t device;
    ino_t inode;
    char *path; /* of the first name, below the top of the copy */
};

struct copy {
    struct failure *failure;
    int top;
    char path[PATH_MAX]; /* of the current member, below the top */
    struct link *links;
    size_t link_count, link_capacity;
};

static int copy_failed(struct copy *copy, const char *what) {
    return fail(copy->failure, errno ? errno : EIO, "cannot %s %s: %s", what, copy->path, strerror(errno));
}

/* xattrs by path, since symbolic links and devices cannot be opened for it. */
static int copy_xattrs(struct copy *copy, int from, int to, const char *name) {
    char source[PATH_MAX], target[PATH_MAX], list[4096], value[65536];
    snprintf(source, sizeof source, "/proc/self/fd/%d/%s", from, name);
    snprintf(target, sizeof target, "/proc/self/fd/%d/%s", to, name);
    ssize_t length = llistxattr(source, list, sizeof list);
    if (length < 0)
        return errno == ENOTSUP ? 0 : copy_failed(copy, "list the xattrs of");
    for (const char *attribute = list; attribute < list + length; attribute += strlen(attribute) + 1) {
        ssize_t size = lgetxattr(source, attribute, value, sizeof value);
        if (size < 0 || (lsetxattr(target, attribute, value, (size_t)size, 0) < 0 && errno != ENOTSUP))
            return copy_failed(copy, "copy the xattrs of");
    }
    return 0;
}

/* Owner, mode, xattrs and times; in this order, since a change of owner clears set-id bits and capabilities. */
static int copy_metadata(struct copy *copy, int from, int to, const char *name, const struct stat *status) {
    struct timespec times[2] = {status->st_atim, status->st_mtim};
    if (fchownat(to, name, status->st_uid, status->st_gid, AT_SYMLINK_NOFOLLOW) < 0 ||
        (!S_ISLNK(status->st_mode) && fchmodat(to, name, status->st_mode & 07777, 0) < 0))
        return copy_failed(copy, "set the owner of");
    if (copy_xattrs(copy, from, to, name))
        return copy->failure->code;
    if (utimensat(to, name, times, AT_SYMLINK_NOFOLLOW) < 0)
        return copy_failed(copy, "set the times of");
    return 0;
}

static int copy_file(struct copy *copy, int from, int to, const char *name) {
    int in = openat(from, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    int out = openat(to, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    ssize_t moved = -1;
    if (in >= 0 && out >= 0)
        while ((moved = sendfile(out, in, NULL, 1 << 20)) > 0)
            ;
    int code = moved < 0 ? copy_failed(copy, "copy") : 0;
    if (in >= 0)
        close(in);
    if (out >= 0)
        close(out);
    return code;
}

static int copy_symlink(struct copy *copy, int from, int to, const char *name) {
    char target[PATH_MAX];
    ssize_t length = readlinkat(from, name, target, sizeof target - 1);
    if (length < 0)
        return copy_failed(copy, "read the link");
    target[length] = 0;
    return symlinkat(target, to, name) < 0 ? copy_failed(copy, "make the link") : 0;
}

/* True when this inode has a name in the copy already, to which `name` is then linked (or `*code` says why not). */
static bool copy_link(struct copy *copy, int to, const char *name, const struct stat *status, int *code) {
    for (size_t i = 0; i < copy->link_count; i++) {
        struct link *link = &copy->links[i];
        if (link->device != status->st_dev || link->inode != status->st_ino)
            continue;
        *code = linkat(copy->top, link->path, to, name, 0) < 0 ? copy_failed(copy, "link") : 0;
        return true;
    }
    if (copy->link_count == copy->link_capacity) {
        size_t capacity = copy->link_capacity ? copy->link_capacity * 2 : 64;
        struct link *links = realloc(copy->links, capacity * sizeof *links);
        if (!links)
            return false; /* the file is copied once more instead */
        copy->links = links;
        copy->link_capacity = capacity;
    }
    char *path = strdup(copy->path);
    if (path)
        copy->links[copy->link_count++] = (struct link){status->st_dev, status->st_ino, path};
    return false;
}

static int copy_directory(struct copy *copy, int from, int to, unsigned depth);

static int copy_subdirectory(struct copy *copy, int from, int to, const char *name, unsigned depth) {
    enum { FLAGS = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC };
    if (depth == MAX_DEPTH)
        return fail(copy->failure, ELOOP, "cannot copy %s: more than %d directories within each other", copy->path,
                    MAX_DEPTH);
    if (mkdirat(to, name, 0700) < 0)
        return copy_failed(copy, "make the directory");
    int below_from = openat(from, name, FLAGS), below_to = openat(to, name, FLAGS);
    int code;
    if (below_from < 0 || below_to < 0) {
        code = copy_failed(copy, "open the directory");
        close(below_from);
    } else {
        code = copy_directory(copy, below_from, below_to, depth + 1); /* closes below_from */
    }
    close(below_to);
    return code;
}

static int copy_member(struct copy *copy, int from, int to, const char *name, unsigned depth) {
    struct stat status;
    if (fstatat(from, name, &status, AT_SYMLINK_NOFOLLOW) < 0)
        return copy_failed(copy, "read");
    int code = 0;
    if (!S_ISDIR(status.st_mode) && status.st_nlink > 1 && copy_link(copy, to, name, &status, &code))
        return code;
    if (S_ISDIR(status.st_mode))
        code = copy_subdirectory(copy, from, to, name, depth);
    else if (S_ISREG(status.st_mode))
        code = copy_file(copy, from, to, name);
    else if (S_ISLNK(status.st_mode))
        code = copy_symlink(copy, from, to, name);
    else if (mknodat(to, name, status.st_mode & (S_IFMT | 0600), status.st_rdev) < 0)
        code = copy_failed(copy, "make the device");
    return code ? code : copy_metadata(copy, from, to, name, &status);
}

static int copy_directory(struct copy *copy, int from, int to, unsigned depth) {
    DIR *directory = fdopendir(from);
    if (!directory) {
        close(from);
        return copy_failed(copy, "read");
    }
    size_t length = strlen(copy->path);
    int code = 0;
    struct dirent *entry;
    while (!code && (errno = 0, entry = readdir(directory))) {
        const char *name = entry->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
            continue;
        int used = snprintf(copy->path + length, sizeof copy->path - length, "%s%s", length ? "/" : "", name);
        if ((size_t)used >= sizeof copy->path - length)
            code = fail(copy->failure, ENAMETOOLONG, "the path %s is too long to be copied", copy->path);
        else
            code = copy_member(copy, from, to, name, depth);
        copy->path[length] = 0;
    }
    if (!code && errno)
        code = copy_failed(copy, "read");
    closedir(directory);
    return code;
}

int copy_tree(int from, int to, struct failure *failure) {
    struct copy *copy = calloc(1, sizeof *copy);
    struct stat status;
    if (!copy)
        return fail(failure, ENOMEM, "no memory to copy a directory");
    copy->failure = failure;
    copy->top = to;
    int again = openat(from, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC); /* copy_directory closes what it reads */
    int code = again < 0 || fstat(from, &status) < 0 ? copy_failed(copy, "read") : copy_directory(copy, again, to, 0);
    if (!code)
        code = copy_metadata(copy, from, to, ".", &status);
    for (size_t i = 0; i < copy->link_count; i++)
        free(copy->links[i].path);
    free(copy->links);
    free(copy);
    return code;
}

static int remove_below(int directory, unsigned depth) {
    DIR *entries = fdopendir(directory);
    if (!entries) {
        close(directory);
        return -1;
    }
    int result = 0;
    struct dirent *entry;
    while (!result && (entry = readdir(entries))) {
        const char *name = entry->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || unlinkat(directory, name, 0) == 0)
            continue;
        int below = depth < MAX_DEPTH + 1 && errno == EISDIR
                        ? openat(directory, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
                        : -1;
        if (below < 0 || remove_below(below, depth + 1) < 0 || unlinkat(directory, name, AT_REMOVEDIR) < 0)
            result = -1;
    }
    closedir(entries);
    return result;
}

int remove_contents(int directory, struct failure *failure) {
    int again = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (again < 0 || remove_below(again, 0) < 0)
        return fail(failure, errno, "cannot remove an unfinished copy: %s", strerror(errno));
    return 0;
}

bool is_empty(int directory) {
    DIR *entries = fdopendir(openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!entries)
        return false;
    bool empty = true;
    struct dirent *entry;
    while (empty && (entry = readdir(entries)))
        empty = strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0;
    closedir(entries);
    return empty;
}

/* No fsync: the journal keeps the order of what changes the tree, so nothing that comes later can be there without the
 * mark. Only the files' data may lag behind their names. */
static int mark_home(int home, const char *state, struct failure *failure) {
    if (fsetxattr(home, HOME_MARK, state, strlen(state), 0) < 0)
        return fail(failure, errno, "cannot mark the home disk: %s", strerror(errno));
    return 0;
}

int seed_home(int from, int home, struct failure *failure) {
    char state[16] = "";
    if (fgetxattr(home, HOME_MARK, state, sizeof state - 1) > 0 && strcmp(state, "ready") == 0)
        return 0;
    unlinkat(home, "lost+found", AT_REMOVEDIR);
    /* A disk that has content but no mark was prepared on the host (a work-seed) and is complete. */
    if (!*state && !is_empty(home))
        return mark_home(home, "ready", failure);
    if (mark_home(home, "seeding", failure) || remove_contents(home, failure) || copy_tree(from, home, failure))
        return failure->code;
    if (syncfs(home) < 0)
        return fail(failure, errno, "cannot write the home disk: %s", strerror(errno));
    return mark_home(home, "ready", failure);
}
