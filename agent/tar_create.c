/* Writes a file tree as a pax stream.
 *
 * - Members are named from the last component of the path, or, with TREE_CONTENTS and for "/", "." and "..", from
 *   inside the directory ("a/b"; the directory itself is no member). Symbolic links are members, and never followed,
 *   except the path itself with TREE_FOLLOW.
 * - pax records appear only where ustar cannot say it: long names, large numbers, times with fractions, attributes,
 *   holes (GNU.sparse 1.0).
 * - Sockets are left out, and so is what vanishes during the walk. What cannot be read is a failure. A file that
 *   shrinks meanwhile is filled up with zeros, one that grows is cut at the size it had. Files that do not say their
 *   size, as in /proc and /sys, are read to their end, up to UNSIZED_MAX.
 * - Other file systems are included, but of kernel interfaces like /proc and /sys only the mount point.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <search.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "tar.h"

enum { XATTR_MAX = 64 * 1024 }; /* bytes of a list of names, and of a value: limits of Linux */

/* A file with several links whose first name is in the stream. */
struct first_link {
    dev_t device;
    ino_t inode;
    nlink_t left;
    char name[];
};

struct creation {
    struct tar_writer writer;
    void *links; /* a search tree of struct first_link */
};

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
    size_t length = strlen(c->writer.name) + 1;
    struct first_link *link = malloc(sizeof *link + length);
    if (link) {
        *link = (struct first_link){status->st_dev, status->st_ino, status->st_nlink - 1};
        memcpy(link->name, c->writer.name, length);
        if (tsearch(link, &c->links, compare_links))
            return 0;
    }
    free(link);
    return fail(c->writer.failure, ENOMEM, "no memory for the hard links of %s", SHOW(c->writer.name));
}

static void forget_link(struct creation *c, struct first_link *link) {
    tdelete(link, &c->links, compare_links);
    free(link);
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
        return errno == ENOTSUP || errno == ENOENT ? 0 : writer_failed(&c->writer, "list the extended attributes of");
    for (const char *attribute = list; attribute < list + size; attribute += strlen(attribute) + 1) {
        ssize_t length = fd >= 0 ? fgetxattr(fd, attribute, value, sizeof value)
                                 : lgetxattr(path, attribute, value, sizeof value);
        if (length < 0 && (errno == ENODATA || errno == EPERM || errno == ENOTSUP))
            continue; /* removed meanwhile, or only for others */
        if (length < 0)
            return writer_failed(&c->writer, "read the extended attributes of");
        xattr_to_key(attribute, key);
        pax_append(&c->writer.records, key, value, (size_t)length);
    }
    return 0;
}

/* Writes one member, which is `name` in `directory`; when it is a directory, without what is in it. `fd` is open for
 * files and directories and -1 for others. Not inlined: its frame is too large for the recursion. */
static __attribute__((noinline)) int emit_entry(struct creation *c, int directory, const char *name, int fd,
                                                const struct stat *status) {
    struct tar_header header = {0};
    char target[PATH_MAX];
    struct first_link *first = NULL;
    ssize_t length;
    c->writer.records.length = 0;
    if (!S_ISDIR(status->st_mode) && status->st_nlink > 1)
        first = find_link(c, status);
    writer_name(&c->writer, header.name, sizeof header.name, c->writer.name, "path");
    writer_octal(&c->writer, header.mode, sizeof header.mode, status->st_mode & 07777, NULL);
    writer_octal(&c->writer, header.uid, sizeof header.uid, status->st_uid, "uid");
    writer_octal(&c->writer, header.gid, sizeof header.gid, status->st_gid, "gid");
    writer_octal(&c->writer, header.size, sizeof header.size, 0, NULL);
    writer_time(&c->writer, &header, status->st_mtim);
    if (first) {
        header.type = '1';
        writer_name(&c->writer, header.link, sizeof header.link, first->name, "linkpath");
        if (--first->left == 0)
            forget_link(c, first);
        return writer_member(&c->writer, &header);
    }
    int code = add_xattrs(c, fd, directory, name);
    if (code)
        return code;
    switch (status->st_mode & S_IFMT) {
    case S_IFREG:
        header.type = '0';
        break;
    case S_IFLNK:
        header.type = '2';
        length = readlinkat(directory, name, target, sizeof target - 1);
        if (length < 0)
            return errno == ENOENT || errno == EINVAL ? 0 : writer_failed(&c->writer, "read the link");
        target[length] = '\0';
        writer_name(&c->writer, header.link, sizeof header.link, target, "linkpath");
        break;
    case S_IFCHR:
    case S_IFBLK:
        header.type = S_ISCHR(status->st_mode) ? '3' : '4';
        writer_octal(&c->writer, header.major, sizeof header.major, major(status->st_rdev), NULL);
        writer_octal(&c->writer, header.minor, sizeof header.minor, minor(status->st_rdev), NULL);
        break;
    default:
        header.type = S_ISDIR(status->st_mode) ? '5' : '6';
    }
    code = header.type == '0' ? writer_file(&c->writer, &header, fd, status) : writer_member(&c->writer, &header);
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

/* Adds all that is in the directory `fd`, which is closed, below the name that c->writer.name holds. */
static int add_contents(struct creation *c, int fd, dev_t device) {
    size_t length = strlen(c->writer.name);
    DIR *entries = fdopendir(fd);
    int code = 0;
    if (!entries) {
        code = writer_failed(&c->writer, "read the directory");
        close(fd);
        return code;
    }
    while (!code) {
        errno = 0;
        const struct dirent *entry = readdir(entries);
        if (!entry) {
            if (errno)
                code = writer_failed(&c->writer, "read the directory");
            break;
        }
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (length + strlen(entry->d_name) >= PATH_MAX) {
            code = fail(c->writer.failure, ENAMETOOLONG, "a path below %s is too long", SHOW(c->writer.name));
            break;
        }
        strcpy(c->writer.name + length, entry->d_name);
        code = add_entry(c, fd, entry->d_name, device, false);
        c->writer.name[length] = '\0';
    }
    closedir(entries);
    return code;
}

/* Adds `name` in `directory`, which lies on `device`, as c->writer.name, with all that is below it. */
static int add_entry(struct creation *c, int directory, const char *name, dev_t device, bool follow) {
    struct stat status;
    int fd = -1;
    bool top = directory == AT_FDCWD;
    if (fstatat(directory, name, &status, follow ? 0 : AT_SYMLINK_NOFOLLOW) < 0)
        return errno == ENOENT && !top ? 0 : writer_failed(&c->writer, "stat");
    if (S_ISSOCK(status.st_mode))
        return !top ? 0
                    : fail(c->writer.failure, EINVAL, "%s is a socket, which a tar stream cannot hold",
                           SHOW(c->writer.name));
    if (S_ISREG(status.st_mode) || S_ISDIR(status.st_mode)) {
        int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | (follow ? 0 : O_NOFOLLOW);
        mode_t type = status.st_mode & S_IFMT;
        fd = openat(directory, name, flags | (type == S_IFDIR ? O_DIRECTORY : 0));
        /* ELOOP, ENOTDIR: something else stands there by now */
        if (fd < 0 && !top && (errno == ENOENT || errno == ELOOP || errno == ENOTDIR))
            return 0;
        if (fd < 0)
            return writer_failed(&c->writer, "open");
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
    size_t length = strlen(c->writer.name);
    strcpy(c->writer.name + length, "/");
    int code = emit_entry(c, directory, name, fd, &status);
    if (code || (status.st_dev != device && !top && is_kernel_interface(status.st_dev)))
        close(fd);
    else
        code = add_contents(c, fd, status.st_dev);
    c->writer.name[length] = '\0';
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
        return fail(c->writer.failure, code, "cannot read the directory %s: %s", SHOW(path), strerror(code));
    }
    c->writer.name[0] = '\0';
    return add_contents(c, fd, status.st_dev);
}

int tar_create(int out, const char *path, const struct tree_options *options, struct failure *failure) {
    struct creation c = {0};
    bool follow = options->flags & TREE_FOLLOW;
    size_t end = strlen(path);
    if (end == 0 || end >= PATH_MAX) {
        fail(failure, end ? ENAMETOOLONG : ENOENT, "the path of the tree is %s", end ? "too long" : "empty");
        return -1;
    }
    while (end > 0 && path[end - 1] == '/')
        end--;
    size_t start = end;
    while (start > 0 && path[start - 1] != '/')
        start--;
    int code = writer_open(&c.writer, out, failure);
    if (!code) {
        char *name = c.writer.name;
        memcpy(name, path + start, end - start);
        bool unnamed = !*name || strcmp(name, ".") == 0 || strcmp(name, "..") == 0;
        code = unnamed || options->flags & TREE_CONTENTS ? add_top_contents(&c, path, follow)
                                                         : add_entry(&c, AT_FDCWD, path, 0, follow);
    }
    if (!code)
        code = writer_finish(&c.writer);
    tdestroy(c.links, free);
    writer_close(&c.writer);
    return code ? -1 : 0;
}
