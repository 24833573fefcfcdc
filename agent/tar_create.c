/* Writes a file tree as a pax stream.
 *
 * - Members are named from the last component of the path, or, with TREE_CONTENTS and for "/", "." and "..", from inside
 *   the directory ("a/b"; the directory itself is no member). Symbolic links are members, and never followed, except
 *   the path itself with TREE_FOLLOW.
 * - pax records appear only where ustar cannot say it: long names, large numbers, times with fractions, attributes,
 *   holes (GNU.sparse 1.0).
 * - Sockets are left out, and so is what vanishes during the walk. What cannot be read is a failure. A file that
 *   shrinks meanwhile is filled up with zeros, one that grows is cut at the size it had.
 * - Other file systems are included, but of kernel interfaces like /proc and /sys only the mount point.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <search.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "tar.h"

enum {
    SENDFILE_MIN = 128 * 1024, /* smaller data is copied through the buffer, together with its headers */
    XATTR_MAX = 64 * 1024,     /* bytes of a list of names, and of a value: limits of Linux */
};

/* A file with several links whose first name is in the stream. */
struct first_link {
    dev_t device;
    ino_t inode;
    nlink_t left;
    char name[];
};

struct creation {
    int out;
    uint8_t *data; /* TAR_BUFFER bytes, of which `used` have to be written */
    size_t used;
    bool no_sendfile;
    struct failure *failure;
    struct buffer records, map;
    struct extents extents;
    void *links; /* a search tree of struct first_link */
    char name[PATH_MAX + 1]; /* of the member; room for the slash of a directory */
};

static int failed(struct creation *c, const char *what) {
    int code = errno;
    return fail(c->failure, code, "cannot %s %s: %s", what, SHOW(c->name), strerror(code));
}

static int flush(struct creation *c) {
    for (size_t done = 0; done < c->used;) {
        ssize_t count = write(c->out, c->data + done, c->used - done);
        if (count < 0 && errno != EINTR)
            return fail(c->failure, errno, "cannot send the tar stream: %s", strerror(errno));
        done += count > 0 ? (size_t)count : 0;
    }
    c->used = 0;
    return 0;
}

static int emit(struct creation *c, const void *data, size_t length) {
    const uint8_t *from = data;
    while (length > 0) {
        size_t room = TAR_BUFFER - c->used, part = length < room ? length : room;
        memcpy(c->data + c->used, from, part);
        c->used += part;
        from += part;
        length -= part;
        int code = c->used == TAR_BUFFER ? flush(c) : 0;
        if (code)
            return code;
    }
    return 0;
}

static int emit_zeros(struct creation *c, uint64_t length) {
    while (length > 0) {
        size_t room = TAR_BUFFER - c->used, part = length < room ? (size_t)length : room;
        memset(c->data + c->used, 0, part);
        c->used += part;
        length -= part;
        int code = c->used == TAR_BUFFER ? flush(c) : 0;
        if (code)
            return code;
    }
    return 0;
}

static int pad(struct creation *c, uint64_t length) {
    return emit_zeros(c, -length % TAR_BLOCK);
}

/* Writes an octal field with its final NUL, or as `pax` record when the number does not fit. */
static void put_octal(struct creation *c, char *field, size_t size, uint64_t number, const char *pax) {
    char digits[24];
    int length = snprintf(digits, sizeof digits, "%0*llo", (int)size - 1, (unsigned long long)number);
    if ((size_t)length < size) {
        memcpy(field, digits, size);
    } else {
        length = snprintf(digits, sizeof digits, "%llu", (unsigned long long)number);
        pax_append(&c->records, pax, digits, (size_t)length);
    }
}

static void put_name(struct creation *c, char *field, size_t size, const char *name, const char *pax) {
    size_t length = strlen(name);
    memcpy(field, name, length < size ? length : size);
    if (length > size)
        pax_append(&c->records, pax, name, length);
}

static void put_time(struct creation *c, struct tar_header *header, struct timespec time) {
    bool fits = time.tv_sec >= 0 && time.tv_sec <= 077777777777;
    snprintf(header->mtime, sizeof header->mtime, "%011llo", fits ? (unsigned long long)time.tv_sec : 0);
    if (fits && time.tv_nsec == 0)
        return;
    /* -1.25 s is kept as -2 s and 750,000,000 ns */
    bool negative = time.tv_sec < 0;
    long nanoseconds = negative && time.tv_nsec ? 1000000000 - time.tv_nsec : time.tv_nsec;
    long long seconds = negative ? -(time.tv_sec + (time.tv_nsec > 0)) : time.tv_sec;
    char text[48];
    int length = snprintf(text, sizeof text, "%s%lld.%09ld", negative ? "-" : "", seconds, nanoseconds);
    pax_append(&c->records, "mtime", text, (size_t)length);
}

static int emit_header(struct creation *c, struct tar_header *header) {
    memcpy(header->magic, "ustar\0" "00", 8);
    snprintf(header->checksum, sizeof header->checksum, "%06o", header_checksum(header));
    header->checksum[7] = ' ';
    return emit(c, header, TAR_BLOCK);
}

/* Writes the pax records, if there are any, and the header. */
static int emit_member(struct creation *c, struct tar_header *header) {
    if (c->records.failed || c->map.failed)
        return fail(c->failure, ENOMEM, "no memory for describing %s", SHOW(c->name));
    if (c->records.length > MAX_PAX_HEADER)
        return fail(c->failure, E2BIG, "%s has too many extended attributes", SHOW(c->name));
    int code = 0;
    if (c->records.length > 0) {
        struct tar_header extension = {.type = 'x', .mode = "0000644", .uid = "0000000", .gid = "0000000"};
        const char *slash = strrchr(c->name, '/');
        const char *base = slash && slash[1] ? slash + 1 : c->name;
        snprintf(extension.name, sizeof extension.name, "PaxHeaders/%.80s", base);
        snprintf(extension.size, sizeof extension.size, "%011zo", c->records.length);
        memcpy(extension.mtime, header->mtime, sizeof extension.mtime);
        code = emit_header(c, &extension);
        if (!code)
            code = emit(c, c->records.data, c->records.length);
        if (!code)
            code = pad(c, c->records.length);
    }
    return code ? code : emit_header(c, header);
}

/* Adds the attributes of the open file `fd`, or, when that is -1, of `name` in `directory`, a link as such. */
static int add_xattrs(struct creation *c, int fd, int directory, const char *name) {
    char list[XATTR_MAX], value[XATTR_MAX], key[XATTR_KEY_SIZE], path[PATH_MAX + 32];
    if (directory == AT_FDCWD)
        snprintf(path, sizeof path, "%s", name);
    else
        snprintf(path, sizeof path, "/proc/self/fd/%d/%s", directory, name);
    ssize_t size = fd >= 0 ? flistxattr(fd, list, sizeof list) : llistxattr(path, list, sizeof list);
    if (size < 0)
        return errno == ENOTSUP || errno == ENOENT ? 0 : failed(c, "list the extended attributes of");
    for (const char *attribute = list; attribute < list + size; attribute += strlen(attribute) + 1) {
        ssize_t length = fd >= 0 ? fgetxattr(fd, attribute, value, sizeof value)
                                 : lgetxattr(path, attribute, value, sizeof value);
        if (length < 0 && (errno == ENODATA || errno == EPERM || errno == ENOTSUP))
            continue; /* removed meanwhile, or only for others */
        if (length < 0)
            return failed(c, "read the extended attributes of");
        xattr_to_key(attribute, key);
        pax_append(&c->records, key, value, (size_t)length);
    }
    return 0;
}

/* Sends `length` bytes from `offset` of the file; zeros for what it no longer has. */
static int emit_data(struct creation *c, int fd, uint64_t offset, uint64_t length) {
    int code = 0;
    off_t position = (off_t)offset;
    while (length >= SENDFILE_MIN && !c->no_sendfile) {
        code = flush(c);
        if (code)
            return code;
        ssize_t count = sendfile(c->out, fd, &position, length < INT32_MAX ? (size_t)length : INT32_MAX);
        if (count < 0 && (errno == EINVAL || errno == ENOSYS))
            c->no_sendfile = true; /* not for this kind of file or of `out`, so copy; rare enough to stay with it */
        else if (count < 0 && errno != EINTR && errno != EAGAIN)
            return failed(c, "send");
        else if (count == 0)
            return emit_zeros(c, length);
        length -= count > 0 ? (uint64_t)count : 0;
    }
    while (length > 0) {
        size_t room = TAR_BUFFER - c->used, part = length < room ? (size_t)length : room;
        ssize_t count = pread(fd, c->data + c->used, part, position);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return failed(c, "read");
        if (count == 0)
            return emit_zeros(c, length);
        c->used += (size_t)count;
        position += count;
        length -= (uint64_t)count;
        code = c->used == TAR_BUFFER ? flush(c) : 0;
        if (code)
            return code;
    }
    return 0;
}

/* Finds the data of a file with holes; no extents when there is none, or the file system cannot tell. */
static int find_extents(struct creation *c, int fd, const struct stat *status) {
    c->extents.count = 0;
    if ((uint64_t)status->st_blocks * 512 >= (uint64_t)status->st_size)
        return 0;
    off_t end = 0, size = status->st_size;
    while (end < size) {
        off_t data = lseek(fd, end, SEEK_DATA);
        if (data < 0 && errno != ENXIO) /* ENXIO: only a hole from here on */
            return errno == EINVAL ? 0 : failed(c, "find the holes of");
        if (data < 0 || data >= size)
            break;
        end = lseek(fd, data, SEEK_HOLE);
        if (end <= data || end > size || c->extents.count == MAX_EXTENTS - 2)
            end = size;
        if (data == 0 && end == size)
            return 0;
        if (!extents_add(&c->extents, (uint64_t)data, (uint64_t)(end - data)))
            return fail(c->failure, ENOMEM, "no memory for the holes of %s", SHOW(c->name));
    }
    /* An empty extent at the end tells GNU tar the size. */
    return end == size || extents_add(&c->extents, (uint64_t)size, 0)
               ? 0
               : fail(c->failure, ENOMEM, "no memory for the holes of %s", SHOW(c->name));
}

/* The map of a sparse file, padded to blocks, as it stands before the data. */
static void make_map(struct creation *c) {
    char line[48];
    c->map.length = 0;
    int length = snprintf(line, sizeof line, "%zu\n", c->extents.count);
    buffer_append(&c->map, line, (size_t)length);
    for (size_t i = 0; i < c->extents.count; i++) {
        length = snprintf(line, sizeof line, "%llu\n%llu\n", (unsigned long long)c->extents.list[i].offset,
                          (unsigned long long)c->extents.list[i].length);
        buffer_append(&c->map, line, (size_t)length);
    }
    buffer_append(&c->map, (const char[TAR_BLOCK]){0}, -c->map.length % TAR_BLOCK);
}

static int emit_file(struct creation *c, struct tar_header *header, int fd, const struct stat *status) {
    uint64_t size = (uint64_t)status->st_size, stored = size;
    int code = find_extents(c, fd, status);
    if (code)
        return code;
    if (c->extents.count > 0) {
        char digits[24];
        int length = snprintf(digits, sizeof digits, "%llu", (unsigned long long)size);
        make_map(c);
        stored = c->map.length;
        for (size_t i = 0; i < c->extents.count; i++)
            stored += c->extents.list[i].length;
        pax_append(&c->records, "GNU.sparse.major", "1", 1);
        pax_append(&c->records, "GNU.sparse.minor", "0", 1);
        pax_append(&c->records, "GNU.sparse.name", c->name, strlen(c->name));
        pax_append(&c->records, "GNU.sparse.realsize", digits, (size_t)length);
    }
    put_octal(c, header->size, sizeof header->size, stored, "size");
    code = emit_member(c, header);
    if (!code && c->extents.count == 0)
        code = emit_data(c, fd, 0, size);
    if (!code && c->extents.count > 0)
        code = emit(c, c->map.data, c->map.length);
    for (size_t i = 0; i < c->extents.count && !code; i++)
        code = emit_data(c, fd, c->extents.list[i].offset, c->extents.list[i].length);
    return code ? code : pad(c, stored);
}

static int compare_links(const void *left, const void *right) {
    const struct first_link *a = left, *b = right;
    if (a->device != b->device)
        return a->device < b->device ? -1 : 1;
    return a->inode < b->inode ? -1 : a->inode > b->inode;
}

/* The member that is already in the stream and the same file, or NULL. The file is forgotten with its last name. */
static struct first_link *find_link(struct creation *c, const struct stat *status) {
    struct first_link key = {.device = status->st_dev, .inode = status->st_ino};
    struct first_link **found = tfind(&key, &c->links, compare_links);
    return found ? *found : NULL;
}

static int remember_link(struct creation *c, const struct stat *status) {
    size_t length = strlen(c->name) + 1;
    struct first_link *link = malloc(sizeof *link + length);
    if (link) {
        *link = (struct first_link){status->st_dev, status->st_ino, status->st_nlink - 1};
        memcpy(link->name, c->name, length);
        if (tsearch(link, &c->links, compare_links))
            return 0;
    }
    free(link);
    return fail(c->failure, ENOMEM, "no memory for the hard links of %s", SHOW(c->name));
}

static void forget_link(struct creation *c, struct first_link *link) {
    tdelete(link, &c->links, compare_links);
    free(link);
}

/* Writes the member c->name, which is `name` in `directory`; when it is a directory, without what is in it. `fd` is open
 * for files and directories and -1 for others. Not inlined: its frame is too large for the recursion. */
static __attribute__((noinline)) int emit_entry(struct creation *c, int directory, const char *name, int fd, const struct stat *status) {
    struct tar_header header = {0};
    char target[PATH_MAX];
    struct first_link *first = NULL;
    int code = 0;
    c->records.length = 0;
    if (!S_ISDIR(status->st_mode) && status->st_nlink > 1)
        first = find_link(c, status);
    put_name(c, header.name, sizeof header.name, c->name, "path");
    put_octal(c, header.mode, sizeof header.mode, status->st_mode & 07777, NULL);
    put_octal(c, header.uid, sizeof header.uid, status->st_uid, "uid");
    put_octal(c, header.gid, sizeof header.gid, status->st_gid, "gid");
    put_octal(c, header.size, sizeof header.size, 0, NULL);
    put_time(c, &header, status->st_mtim);
    if (first) {
        header.type = '1';
        put_name(c, header.link, sizeof header.link, first->name, "linkpath");
        if (--first->left == 0)
            forget_link(c, first);
        return emit_member(c, &header);
    }
    code = add_xattrs(c, fd, directory, name);
    if (code)
        return code;
    switch (status->st_mode & S_IFMT) {
    case S_IFREG:
        header.type = '0';
        code = emit_file(c, &header, fd, status);
        break;
    case S_IFLNK: {
        ssize_t length = readlinkat(directory, name, target, sizeof target - 1);
        if (length < 0)
            return errno == ENOENT || errno == EINVAL ? 0 : failed(c, "read the link");
        target[length] = '\0';
        header.type = '2';
        put_name(c, header.link, sizeof header.link, target, "linkpath");
        code = emit_member(c, &header);
        break;
    }
    default:
        header.type = S_ISDIR(status->st_mode) ? '5' : S_ISFIFO(status->st_mode) ? '6' : S_ISCHR(status->st_mode) ? '3' : '4';
        if (S_ISCHR(status->st_mode) || S_ISBLK(status->st_mode)) {
            put_octal(c, header.major, sizeof header.major, major(status->st_rdev), NULL);
            put_octal(c, header.minor, sizeof header.minor, minor(status->st_rdev), NULL);
        }
        code = emit_member(c, &header);
    }
    if (!code && !S_ISDIR(status->st_mode) && status->st_nlink > 1)
        code = remember_link(c, status);
    return code;
}

/* Whether `device` is a file system that shows the kernel instead of storing files. What is not in mountinfo (such as
 * a subvolume of btrfs) is not. */
static bool is_kernel_interface(dev_t device) {
    static const char *const types[] = {
        "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs",
        "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "rpc_pipefs", "securityfs", "selinuxfs", "sysfs",
        "tracefs",
    };
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    char *line = NULL, type[32];
    size_t size = 0;
    bool found = false;
    /* proc_pid_mountinfo(5): ID parent major:minor root point options [tags...] - type source options */
    while (mounts && !found && getline(&line, &size, mounts) > 0) {
        unsigned major, minor;
        const char *rest = strstr(line, " - ");
        if (sscanf(line, "%*u %*u %u:%u", &major, &minor) != 2 || makedev(major, minor) != device || !rest ||
            sscanf(rest, " - %31s", type) != 1)
            continue;
        for (size_t i = 0; i < sizeof types / sizeof *types; i++)
            found |= strcmp(type, types[i]) == 0;
    }
    free(line);
    if (mounts)
        fclose(mounts);
    return found;
}

static int add_entry(struct creation *c, int directory, const char *name, dev_t device, bool follow);

/* Adds all that is in the directory `fd`, which is closed, below the name that c->name holds. */
static int add_contents(struct creation *c, int fd, dev_t device) {
    size_t length = strlen(c->name);
    DIR *entries = fdopendir(fd);
    int code = 0;
    if (!entries) {
        code = failed(c, "read the directory");
        close(fd);
        return code;
    }
    while (!code) {
        errno = 0;
        const struct dirent *entry = readdir(entries);
        if (!entry) {
            if (errno)
                code = failed(c, "read the directory");
            break;
        }
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (length + strlen(entry->d_name) >= PATH_MAX) {
            code = fail(c->failure, ENAMETOOLONG, "a path below %s is too long", SHOW(c->name));
            break;
        }
        strcpy(c->name + length, entry->d_name);
        code = add_entry(c, fd, entry->d_name, device, false);
        c->name[length] = '\0';
    }
    closedir(entries);
    return code;
}

/* Adds `name` in `directory`, which lies on `device`, as c->name, with all that is below it. */
static int add_entry(struct creation *c, int directory, const char *name, dev_t device, bool follow) {
    struct stat status;
    int fd = -1;
    bool top = directory == AT_FDCWD;
    if (fstatat(directory, name, &status, follow ? 0 : AT_SYMLINK_NOFOLLOW) < 0)
        return errno == ENOENT && !top ? 0 : failed(c, "stat");
    if (S_ISSOCK(status.st_mode))
        return top ? fail(c->failure, EINVAL, "%s is a socket, which a tar stream cannot hold", SHOW(c->name)) : 0;
    if (S_ISREG(status.st_mode) || S_ISDIR(status.st_mode)) {
        int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | (follow ? 0 : O_NOFOLLOW);
        mode_t type = status.st_mode & S_IFMT;
        fd = openat(directory, name, flags | (type == S_IFDIR ? O_DIRECTORY : 0));
        if (fd < 0)
            /* ELOOP, ENOTDIR: something else stands there by now */
            return !top && (errno == ENOENT || errno == ELOOP || errno == ENOTDIR) ? 0 : failed(c, "open");
        if (fstat(fd, &status) < 0 || (status.st_mode & S_IFMT) != type) {
            close(fd);
            return 0;
        }
    }
    if (!S_ISDIR(status.st_mode)) {
        int code = emit_entry(c, directory, name, fd, &status);
        if (fd >= 0)
            close(fd);
        return code;
    }
    size_t length = strlen(c->name);
    strcpy(c->name + length, "/");
    int code = emit_entry(c, directory, name, fd, &status);
    if (code || (status.st_dev != device && !top && is_kernel_interface(status.st_dev)))
        close(fd);
    else
        code = add_contents(c, fd, status.st_dev);
    c->name[length] = '\0';
    return code;
}

/* Adds what is inside the directory `path`. */
static int add_top_contents(struct creation *c, const char *path, bool follow) {
    struct stat status;
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | (follow ? 0 : O_NOFOLLOW));
    if (fd < 0 || fstat(fd, &status) < 0) {
        int code = errno;
        if (fd >= 0)
            close(fd);
        return fail(c->failure, code, "cannot read the directory %s: %s", SHOW(path), strerror(code));
    }
    c->name[0] = '\0';
    return add_contents(c, fd, status.st_dev);
}

int tar_create(int out, const char *path, const struct tree_options *options, struct failure *failure) {
    struct creation c = {.out = out, .failure = failure, .data = malloc(TAR_BUFFER)};
    size_t end = strlen(path);
    while (end > 0 && path[end - 1] == '/')
        end--;
    size_t start = end;
    while (start > 0 && path[start - 1] != '/')
        start--;
    int code;
    if (!c.data)
        code = fail(failure, ENOMEM, "no memory for making a tar stream");
    else if (!*path || strlen(path) >= PATH_MAX)
        code = fail(failure, *path ? ENAMETOOLONG : ENOENT, "the path of the tree is %s", *path ? "too long" : "empty");
    else {
        memcpy(c.name, path + start, end - start);
        bool unnamed = !c.name[0] || strcmp(c.name, ".") == 0 || strcmp(c.name, "..") == 0;
        if (unnamed || options->flags & TREE_CONTENTS)
            code = add_top_contents(&c, path, options->flags & TREE_FOLLOW);
        else
            code = add_entry(&c, AT_FDCWD, path, 0, options->flags & TREE_FOLLOW);
    }
    if (!code)
        code = emit_zeros(&c, 2 * TAR_BLOCK);
    if (!code)
        code = flush(&c);
    tdestroy(c.links, free);
    free(c.data);
    free(c.extents.list);
    buffer_free(&c.records);
    buffer_free(&c.map);
    return code ? -1 : 0;
}
