/* Opens directories component by component, resolving symbolic links itself.
 *
 * openat2(RESOLVE_BENEATH) would do it in one call, but needs Linux 5.6 and refuses the absolute links of a tree that
 * is extracted to /. RESOLVE_IN_ROOT follows those, but cannot make what is missing on the way. Other processes that move
 * directories meanwhile gain nothing: the descriptor stays with the directory that was opened, and ".." is never handed
 * to the kernel.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "beneath.h"

enum { MAX_TURNS = 255 }; /* symbolic links and ".." that may be met on the way to one directory */

bool normalise_name(const char *name, char path[]) {
    size_t used = 0;
    while (*name) {
        size_t length = strcspn(name, "/");
        if (length == 2 && memcmp(name, "..", 2) == 0)
            return false;
        if (length > 0 && !(length == 1 && *name == '.')) {
            if (used + length + 2 > PATH_MAX)
                return false;
            if (used > 0)
                path[used++] = '/';
            memcpy(path + used, name, length);
            used += length;
        }
        name += length + (name[length] == '/');
    }
    path[used] = '\0';
    return true;
}

int make_directory(int parent, const char *name, mode_t mode, const struct tree_options *options) {
    if (mkdirat(parent, name, mode) < 0)
        return -1;
    if (!options->set_owner || geteuid() != 0)
        return 0;
    return fchownat(parent, name, options->uid, options->gid, AT_SYMLINK_NOFOLLOW);
}

static int open_child(int parent, const char *name) {
    return openat(parent, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

/* In the tree that is the whole file system nothing leads out. */
static bool is_slash(int root) {
    struct stat status, slash;
    return fstat(root, &status) == 0 && stat("/", &slash) == 0 && status.st_dev == slash.st_dev &&
           status.st_ino == slash.st_ino;
}

/* Walks down `todo` from `root` as far as there are directories: returns one when it got to the end, or -1 with errno.
 * When that is zero, a symbolic link or ".." was met, and `todo` has become the path to go instead. With `is_root`
 * nothing leads out of `root`, as nothing leads out of /. */
static int walk(int root, char todo[2 * PATH_MAX], const struct tree_options *maker, bool is_root) {
    char done[2 * PATH_MAX] = "", next[2 * PATH_MAX], target[PATH_MAX];
    int directory = fcntl(root, F_DUPFD_CLOEXEC, 0);
    char *save, *name = strtok_r(todo, "/", &save);
    for (; directory >= 0 && name && strcmp(name, "..") != 0; name = strtok_r(NULL, "/", &save)) {
        if (strcmp(name, ".") == 0)
            continue;
        int child = open_child(directory, name);
        if (child < 0 && errno == ENOENT && maker &&
            (make_directory(directory, name, 0755, maker) == 0 || errno == EEXIST))
            child = open_child(directory, name);
        if (child < 0)
            break;
        close(directory);
        directory = child;
        strcat(strcat(done, "/"), name); /* never longer than what was in `todo` */
    }
    if (directory < 0 || !name)
        return directory;

    const char *base = done, *detour = "";
    int code = 0;
    if (strcmp(name, "..") == 0) {
        /* Down again from the root: by now the directory may have been moved, and its parent be anything. */
        char *slash = strrchr(done, '/');
        if (slash)
            *slash = '\0';
        else if (!is_root && !is_slash(root))
            code = EXDEV;
    } else if (errno == ENOTDIR) {
        ssize_t length = readlinkat(directory, name, target, sizeof target - 1);
        target[length < 0 ? 0 : length] = '\0';
        detour = target;
        if (length < 0)
            code = errno == EINVAL ? ENOTDIR : errno;
        else if (*target == '/') {
            base = "";
            code = is_root || is_slash(root) ? 0 : EXDEV;
        }
    } else {
        code = errno;
    }
    close(directory);
    if (snprintf(next, sizeof next, "%s/%s/%s", base, detour, save ? save : "") >= (int)sizeof next)
        code = ENAMETOOLONG;
    memcpy(todo, next, sizeof next);
    errno = code;
    return -1;
}

static int walk_all(int root, const char *path, const struct tree_options *maker, bool is_root) {
    char todo[2 * PATH_MAX];
    if (strlen(path) >= sizeof todo) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(todo, path);
    for (int turns = 0; turns < MAX_TURNS; turns++) {
        int directory = walk(root, todo, maker, is_root);
        if (directory >= 0 || errno != 0)
            return directory;
    }
    errno = ELOOP;
    return -1;
}

int open_beneath(int root, const char *path, const struct tree_options *maker) {
    return walk_all(root, path, maker, false);
}

int open_in_root(int root, const char *path, bool make) {
    static const struct tree_options plain = {0};
    return walk_all(root, path, make ? &plain : NULL, true);
}

int open_parent_in_root(int root, const char *path, char leaf[NAME_MAX + 1]) {
    char todo[2 * PATH_MAX], target[PATH_MAX];
    if (strlen(path) >= PATH_MAX) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(todo, path);
    for (int turns = 0; turns < MAX_TURNS; turns++) {
        char *slash = strrchr(todo, '/');
        if (!slash || strlen(slash + 1) > NAME_MAX) {
            errno = slash ? ENAMETOOLONG : EINVAL;
            return -1;
        }
        strcpy(leaf, slash + 1);
        slash[1] = 0;
        int parent = open_in_root(root, todo, true);
        ssize_t length = parent >= 0 ? readlinkat(parent, leaf, target, sizeof target - 1) : -1;
        if (length < 0)
            return parent;
        close(parent);
        target[length] = 0;
        if (*target == '/')
            *todo = 0;
        if (strlen(todo) + (size_t)length >= PATH_MAX) {
            errno = ENAMETOOLONG;
            return -1;
        }
        strcat(todo, target);
    }
    errno = ELOOP;
    return -1;
}
