/* Extracts tar streams below a directory that nothing in them can leave.
 *
 * - Names lose leading slashes; ".." in them is refused. Every parent directory is opened component by component
 *   without following links. A symbolic link among them is resolved here, against the directory extracted to, and
 *   refused where it leads out of it (so `lib -> usr/lib` works, and a link from the stream cannot be used to escape).
 *   Targets of hard links are found the same way. Targets of symbolic links are just text and are kept.
 * - Anything but a directory is made anew, after an existing file, link or empty directory of that name is removed:
 *   nothing is ever written through a link. A directory merges into an existing one; a file in its place is an error.
 * - Directories get owner, mode, times and attributes at the end. A member "./" sets those of the directory
 *   extracted to only if this extraction made it: an archive of "." must not make / private.
 * - Extended attributes that the kernel or file system refuses (ENOTSUP, EPERM) are left out.
 * - Without root, owners are left out, and the setuid and setgid bits with them.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "beneath.h"
#include "tar.h"

enum { HOLE = 4096 }; /* zeros become holes in units of this many bytes */

/* A directory whose attributes are set at the end. */
struct pending {
    char *path; /* below the root, without "." and ".."; empty: the root itself */
    dev_t device;
    ino_t inode;
    mode_t mode;
    uid_t uid;
    gid_t gid;
    struct timespec mtime;
    struct buffer records; /* with its extended attributes */
    size_t order;
};

struct extraction {
    struct tar_reader reader;
    struct failure *failure;
    const struct tree_options *options;
    int root;
    bool root_made, privileged;
    int parent; /* the directory that was used last, and its path, or -1 */
    char parent_path[PATH_MAX];
    struct pending *pending;
    size_t count, capacity;
};

static int failed(struct extraction *x, const char *what, const char *name) {
    int code = errno;
    return fail(x->failure, code, "cannot %s %s: %s", what, SHOW(name), strerror(code));
}

static void forget_parent(struct extraction *x) {
    if (x->parent >= 0)
        close(x->parent);
    x->parent = -1;
}

/* Splits `path` in place; afterwards x->parent is the directory of its last component, which is returned. */
static char *enter_parent(struct extraction *x, char *path) {
    char *slash = strrchr(path, '/');
    const char *parent = slash ? path : "";
    if (slash)
        *slash = '\0';
    if (x->parent < 0 || strcmp(x->parent_path, parent) != 0) {
        forget_parent(x);
        x->parent = open_beneath(x->root, parent, x->options);
        strcpy(x->parent_path, parent);
    }
    char *name = slash ? slash + 1 : path;
    return x->parent < 0 ? NULL : name;
}

/* Makes the member under `name` in x->parent: a file, whose descriptor is returned, a hard link to `target` in the
 * directory `source`, a symbolic link, a device or a fifo. */
static int make(const struct extraction *x, const char *name, int source, const char *target) {
    const struct member *member = &x->reader.member;
    switch (member->type) {
    case '0':
        return openat(x->parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    case '1':
        return linkat(source, target, x->parent, name, 0);
    case '2':
        return symlinkat(member->link, x->parent, name);
    default:
        return mknodat(x->parent, name,
                       member->mode | (member->type == '3' ? S_IFCHR : member->type == '4' ? S_IFBLK : S_IFIFO),
                       member->device);
    }
}

/* The same; a file, link or empty directory that stands there already is removed first. */
static int make_anew(const struct extraction *x, const char *name, int source, const char *target) {
    int made = make(x, name, source, target);
    if (made >= 0 || errno != EEXIST)
        return made;
    if (unlinkat(x->parent, name, 0) < 0 &&
        ((errno != EISDIR && errno != EPERM) || unlinkat(x->parent, name, AT_REMOVEDIR) < 0))
        return -1;
    return make(x, name, source, target);
}

static bool missing_feature(void) {
    return errno == ENOTSUP || errno == EPERM;
}

/* Sets the extended attributes of the open file `fd`, or, when that is -1, of `name` in x->parent, a link as such. */
static int set_xattrs(struct extraction *x, const struct buffer *records, int fd, const char *name) {
    struct bytes rest = {records->data, records->length}, key, value;
    char attribute[XATTR_KEY_SIZE], path[64 + NAME_MAX];
    bool bad;
    while (pax_next(&rest, &key, &value, &bad)) {
        if (!xattr_from_key(key, attribute))
            continue;
        /* There is no lsetxattrat before Linux 6.13. */
        snprintf(path, sizeof path, "/proc/self/fd/%d/%s", x->parent, name);
        int result = fd >= 0 ? fsetxattr(fd, attribute, value.data, value.length, 0)
                             : lsetxattr(path, attribute, value.data, value.length, 0);
        if (result < 0 && !missing_feature())
            return -1;
    }
    return 0;
}

/* Owner first, since a change of it clears the setuid bits and file capabilities. */
static int set_attributes(struct extraction *x, const struct pending *a, int fd, const char *name) {
    struct timespec times[2] = {{.tv_nsec = UTIME_NOW}, a->mtime};
    if (x->privileged && (fd >= 0 ? fchown(fd, a->uid, a->gid)
                                  : fchownat(x->parent, name, a->uid, a->gid, AT_SYMLINK_NOFOLLOW)) < 0)
        return -1;
    if (set_xattrs(x, &a->records, fd, name) < 0)
        return -1;
    if (fd >= 0 && fchmod(fd, x->privileged ? a->mode : a->mode & 01777) < 0)
        return -1;
    return fd >= 0 ? futimens(fd, times) : utimensat(x->parent, name, times, AT_SYMLINK_NOFOLLOW);
}

static struct pending attributes_of(const struct extraction *x) {
    const struct member *member = &x->reader.member;
    return (struct pending){
        .mode = member->mode,
        .uid = x->options->set_owner ? x->options->uid : member->uid,
        .gid = x->options->set_owner ? x->options->gid : member->gid,
        .mtime = member->mtime,
        .records = x->reader.records,
    };
}

static int write_all(int fd, const uint8_t *data, size_t length, uint64_t offset) {
    while (length > 0) {
        ssize_t count = pwrite(fd, data, length, (off_t)offset);
        if (count < 0 && errno != EINTR)
            return -1;
        if (count > 0) {
            data += count;
            length -= (size_t)count;
            offset += (uint64_t)count;
        }
    }
    return 0;
}

/* Writes `data`, which lies at `offset` of the file, but leaves out blocks of zeros. */
static int write_sparse(int fd, const uint8_t *data, size_t length, uint64_t offset) {
    size_t written = 0, position = 0;
    while (position < length) {
        size_t block = HOLE - (offset + position) % HOLE;
        if (block > length - position)
            block = length - position;
        if (block == HOLE && is_zero(data + position, block)) {
            if (write_all(fd, data + written, position - written, offset + written) < 0)
                return -1;
            written = position + block;
        }
        position += block;
    }
    return write_all(fd, data + written, length - written, offset + written);
}

static int extract_data(struct extraction *x, int fd) {
    struct tar_reader *reader = &x->reader;
    const struct extents *extents = &reader->member.extents;
    for (size_t i = 0; i < extents->count; i++) {
        uint64_t offset = extents->list[i].offset, left = extents->list[i].length;
        while (left > 0) {
            /* Whole blocks, so that zeros are recognised wherever the pipe cuts. */
            size_t block = HOLE - offset % HOLE;
            struct bytes data;
            int code = reader_data(reader, left < block ? (size_t)left : block, &data);
            if (code)
                return code;
            if (data.length > left)
                data.length = (size_t)left;
            if (data.length < left)
                data.length -= (offset + data.length) % HOLE;
            if (write_sparse(fd, data.data, data.length, offset) < 0)
                return failed(x, "write", reader->member.name);
            offset += data.length;
            left -= data.length;
            reader_take(reader, data.length);
        }
    }
    /* The file may end with a hole. */
    return ftruncate(fd, (off_t)reader->member.size) < 0 ? failed(x, "write", reader->member.name) : 0;
}

static int extract_file(struct extraction *x, const char *name) {
    const struct member *member = &x->reader.member;
    int fd = make_anew(x, name, -1, NULL);
    if (fd < 0)
        return failed(x, "create", member->name);
    struct pending attributes = attributes_of(x);
    int code = extract_data(x, fd);
    if (!code && set_attributes(x, &attributes, fd, name) < 0)
        code = failed(x, "set the attributes of", member->name);
    if (close(fd) < 0 && !code)
        code = failed(x, "write", member->name);
    if (code)
        unlinkat(x->parent, name, 0);
    return code;
}

static int extract_link(struct extraction *x, const char *name) {
    const struct member *member = &x->reader.member;
    char path[PATH_MAX];
    struct stat source, existing;
    if (!normalise_name(member->link, path) || !*path)
        return fail(x->failure, EXDEV, "%s is a hard link to %s, which is no file in the tree", SHOW(member->name),
                    SHOW(member->link));
    char *slash = strrchr(path, '/');
    if (slash)
        *slash = '\0';
    const char *target = slash ? slash + 1 : path;
    int directory = open_beneath(x->root, slash ? path : "", NULL);
    int made = directory < 0 ? -1 : fstatat(directory, target, &source, AT_SYMLINK_NOFOLLOW);
    bool same = made == 0 && fstatat(x->parent, name, &existing, AT_SYMLINK_NOFOLLOW) == 0 &&
                existing.st_dev == source.st_dev && existing.st_ino == source.st_ino;
    if (made == 0 && !same)
        made = make_anew(x, name, directory, target);
    int code = made < 0 ? errno : 0;
    if (directory >= 0)
        close(directory);
    return code ? fail(x->failure, code, "cannot link %s to %s: %s", SHOW(member->name), SHOW(member->link),
                       strerror(code))
                : 0;
}

/* Symbolic links, devices and fifos. */
static int extract_node(struct extraction *x, const char *name) {
    const struct member *member = &x->reader.member;
    struct pending attributes = attributes_of(x);
    if (make_anew(x, name, -1, NULL) < 0)
        return failed(x, "create", member->name);
    return set_attributes(x, &attributes, -1, name) < 0 ? failed(x, "set the attributes of", member->name) : 0;
}

/* Makes the directory, or finds the existing one, and notes its attributes for the end. `path` is its whole path. */
static int extract_directory(struct extraction *x, const char *path) {
    struct member *member = &x->reader.member;
    char parent[PATH_MAX];
    struct stat status;
    if (!*path && !x->root_made)
        return 0;
    if (*path) {
        strcpy(parent, path);
        char *name = enter_parent(x, parent);
        if (!name || (make_directory(x->parent, name, 0700, x->options) < 0 && errno != EEXIST))
            return failed(x, "create the directory", member->name);
    }
    int fd = open_beneath(x->root, path, NULL);
    int found = fd < 0 ? -1 : fstat(fd, &status);
    if (fd >= 0)
        close(fd);
    if (found < 0)
        return failed(x, "extract the directory", member->name);
    if (x->count == x->capacity) {
        size_t capacity = x->capacity ? x->capacity * 2 : 64;
        struct pending *list = realloc(x->pending, capacity * sizeof *list);
        if (!list)
            return failed(x, "remember the directory", member->name);
        x->pending = list;
        x->capacity = capacity;
    }
    struct pending *pending = &x->pending[x->count];
    *pending = attributes_of(x);
    pending->path = strdup(path);
    if (!pending->path)
        return failed(x, "remember the directory", member->name);
    pending->device = status.st_dev;
    pending->inode = status.st_ino;
    pending->order = x->count++;
    x->reader.records = (struct buffer){0}; /* now in `pending` */
    return 0;
}

static int extract_member(struct extraction *x) {
    const struct member *member = &x->reader.member;
    char path[PATH_MAX];
    if (!normalise_name(member->name, path))
        return fail(x->failure, EXDEV, "%s leads out of the tree (or is too long)", SHOW(member->name));
    if (member->type == '5')
        return extract_directory(x, path);
    if (!*path)
        return fail(x->failure, EISDIR, "the member %s has no name but is no directory", SHOW(member->name));
    const char *name = enter_parent(x, path);
    if (!name)
        return errno == EXDEV ? fail(x->failure, EXDEV, "cannot extract %s: a symbolic link leads out of the tree",
                                     SHOW(member->name))
                              : failed(x, "create the directory of", member->name);
    switch (member->type) {
    case '0':
        return extract_file(x, name);
    case '1':
        return extract_link(x, name);
    default:
        return extract_node(x, name);
    }
}

/* Children before their parents (which may become unsearchable), and the last member of the same name first. */
static int compare_pending(const void *left, const void *right) {
    const struct pending *a = left, *b = right;
    int order = strcmp(b->path, a->path);
    return order ? order : a->order < b->order ? 1 : -1;
}

static int finish_directories(struct extraction *x) {
    int code = 0;
    if (x->count > 1)
        qsort(x->pending, x->count, sizeof *x->pending, compare_pending);
    for (size_t i = 0; i < x->count && !code; i++) {
        const struct pending *pending = &x->pending[i];
        struct stat status;
        if (i > 0 && strcmp(pending->path, pending[-1].path) == 0)
            continue;
        int path = open_beneath(x->root, pending->path, NULL);
        int fd = path < 0 ? -1 : openat(path, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        /* A later member may have replaced it. */
        bool same = path >= 0 && fstat(path, &status) == 0 && status.st_dev == pending->device &&
                    status.st_ino == pending->inode;
        if (same && (fd < 0 || set_attributes(x, pending, fd, "") < 0))
            code = failed(x, "set the attributes of", *pending->path ? pending->path : "the directory extracted to");
        if (fd >= 0)
            close(fd);
        if (path >= 0)
            close(path);
    }
    return code;
}

/* Opens the directory to extract to; it is made, with its parents, when it is missing. */
static int open_root(struct extraction *x, const char *path) {
    char prefix[PATH_MAX];
    if (!*path || strlen(path) >= PATH_MAX)
        return fail(x->failure, *path ? ENAMETOOLONG : ENOENT, "cannot extract to a path that is %s",
                    *path ? "too long" : "empty");
    for (size_t length = 1; length <= strlen(path); length++) {
        if (path[length] && path[length] != '/')
            continue;
        memcpy(prefix, path, length);
        prefix[length] = '\0';
        if (make_directory(AT_FDCWD, prefix, 0755, x->options) == 0)
            x->root_made = true;
        else if (errno != EEXIST)
            return failed(x, "create the directory", prefix);
    }
    x->root = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (x->root < 0)
        return failed(x, "extract to", path);
    return 0;
}

int tar_extract(int in, const char *path, const struct tree_options *options, struct failure *failure) {
    struct extraction x = {.failure = failure, .options = options, .root = -1, .parent = -1,
                           .privileged = geteuid() == 0};
    mode_t mask = umask(0);
    bool end = false;
    int code = reader_open(&x.reader, in, failure);
    if (!code)
        code = open_root(&x, path);
    while (!code && !(code = reader_next(&x.reader, &end)) && !end)
        code = extract_member(&x);
    if (!code)
        code = finish_directories(&x);
    if (!code)
        code = reader_drain(&x.reader);
    forget_parent(&x);
    if (x.root >= 0)
        close(x.root);
    for (size_t i = 0; i < x.count; i++) {
        free(x.pending[i].path);
        buffer_free(&x.pending[i].records);
    }
    free(x.pending);
    reader_close(&x.reader);
    umask(mask);
    return code ? -1 : 0;
}
