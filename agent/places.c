/* Where things go in the guest's root: what an image has in their place is followed, made or put aside, and never leads
 * out of that root. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "beneath.h"
#include "system.h"

/* What lies where a directory has to be gets this after its name. */
#define ASIDE ".replaced"

enum { ONLY_NEW = 1 }; /* RENAME_NOREPLACE in <linux/fs.h>, which differs from that of <stdio.h> in newer libraries */

bool same_directory(int a, int b) {
    struct stat first, second;
    return fstat(a, &first) == 0 && fstat(b, &second) == 0 && first.st_dev == second.st_dev &&
           first.st_ino == second.st_ino;
}

int directory_open(int root, const char *path, struct failure *failure) {
    enum { LIMIT = 1024 };
    if (path[0] != '/' || strlen(path) >= LIMIT) {
        fail(failure, EINVAL, "%s is no absolute path of less than %d bytes", path, LIMIT);
        return -1;
    }
    int directory = open_in_root(root, path, true);
    if (directory < 0)
        fail(failure, errno, "cannot make the directory %s: %s", path, strerror(errno));
    return directory;
}

int mount_point_open(int root, const char *path, struct failure *failure) {
    int directory = directory_open(root, path, failure);
    if (directory < 0 || !same_directory(directory, root))
        return directory;
    close(directory);
    fail(failure, EINVAL, "%s is the root of the guest", path);
    return -1;
}

/* Nothing of the image or the user is removed. */
static void put_aside(int root, const char *name) {
    char aside[64];
    snprintf(aside, sizeof aside, "%s" ASIDE, name);
    if (syscall(SYS_renameat2, root, name, root, aside, ONLY_NEW) == 0)
        console_print("/%s of the image is no directory: it is /%s now", name, aside);
}

int system_directory(int root, const char *name, mode_t mode, bool linked, struct failure *failure) {
    enum { FLAGS = O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC };
    int directory = linked ? open_in_root(root, name, false) : openat(root, name, FLAGS);
    if (directory >= 0)
        return directory;
    if (linked && errno == ENOENT)
        directory = open_in_root(root, name, true);
    if (directory < 0) {
        put_aside(root, name);
        if (mkdirat(root, name, mode) == 0)
            directory = openat(root, name, FLAGS);
    }
    if (directory < 0)
        fail(failure, errno, "cannot make the directory /%s: %s", name, strerror(errno));
    else if (fchmodat(directory, ".", mode, 0) < 0)
        console_print("cannot set the mode of /%s: %s", name, strerror(errno));
    return directory;
}
