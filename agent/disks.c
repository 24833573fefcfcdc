/* Mounts the guest's disks and builds its root filesystem: image, overlay, home, modules, volumes. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "system.h"

#define IMAGE "/banger/image"
#define OVERLAY "/banger/overlay"
#define ROOT "/banger/root"
#define HOME "/banger/home"

enum { API_FLAGS = MS_NOSUID | MS_NODEV | MS_NOEXEC };

static int overlay_disk = -1; /* the overlay disk is out of sight once the root has moved */
static int home_disk = -1;

/* The image is hostile: its links are followed, but never out of the new root. */
static int open_below(int root, const char *path) {
    struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC,
                           .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

static bool same_directory(int a, int b) {
    struct stat first, second;
    return fstat(a, &first) == 0 && fstat(b, &second) == 0 && first.st_dev == second.st_dev &&
           first.st_ino == second.st_ino;
}

int directory_open(int root, const char *path, struct failure *failure) {
    char prefix[1024];
    size_t length = strlen(path);
    if (path[0] != '/' || length >= sizeof prefix) {
        fail(failure, EINVAL, "%s is no absolute path of less than %zu bytes", path, sizeof prefix);
        return -1;
    }
    int directory = open_below(root, "/");
    for (size_t start = 1; directory >= 0 && start < length;) {
        size_t end = start + strcspn(path + start, "/");
        if (end > start) {
            memcpy(prefix, path, end);
            prefix[end] = 0;
            int next = open_below(root, prefix);
            if (next < 0 && errno == ENOENT && mkdirat(directory, prefix + start, 0755) == 0)
                next = open_below(root, prefix);
            int code = errno;
            close(directory);
            errno = code;
            directory = next;
        }
        start = end + 1;
    }
    if (directory < 0)
        fail(failure, errno, "cannot make the directory %s: %s", path, strerror(errno));
    return directory;
}

/* A directory that must be where it is, like /proc: whatever else the image has there is replaced, in the overlay. */
static int system_directory(int root, const char *name, mode_t mode, struct failure *failure) {
    enum { FLAGS = O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC };
    int directory = openat(root, name, FLAGS);
    if (directory < 0) {
        unlinkat(root, name, 0);
        if (mkdirat(root, name, mode) == 0 && fchmodat(root, name, mode, 0) == 0)
            directory = openat(root, name, FLAGS);
    }
    if (directory < 0)
        fail(failure, errno, "cannot make /%s in the image: %s", name, strerror(errno));
    return directory;
}

/* Mounts on an open directory, so that no link can get in between. */
static int mount_on(int directory, const char *source, const char *type, unsigned long flags, const char *options) {
    char target[64];
    snprintf(target, sizeof target, "/proc/self/fd/%d", directory);
    return mount(source, target, type, flags, options);
}

struct device {
    const char *serial;
    char path[300];
};

static bool device_found(void *context) {
    struct device *device = context;
    DIR *blocks = opendir("/sys/block");
    if (!blocks)
        return false;
    bool found = false;
    struct dirent *entry;
    while (!found && (entry = readdir(blocks))) {
        char path[300], serial[64];
        snprintf(path, sizeof path, "/sys/block/%s/serial", entry->d_name);
        snprintf(device->path, sizeof device->path, "/dev/%s", entry->d_name);
        found = read_line(path, serial, sizeof serial) && strcmp(serial, device->serial) == 0 &&
                access(device->path, F_OK) == 0;
    }
    closedir(blocks);
    return found;
}

/* Mounts one disk on the path `target` of the boot archive. */
static int mount_disk(const struct disk *disk, const char *target, struct failure *failure) {
    struct device device = {.serial = disk->serial};
    if (!device_wait(device_found, &device, DEVICE_WAIT_MS))
        return fail(failure, ENODEV, "there is no disk with the serial %s", disk->serial);
    /* The file on the host is sparse: deletions are handed on, so that it shrinks again, and the inode tables that
     * mke2fs left out are not filled with zeros in the background (ext4(5)). */
    const char *options = disk->readonly || strcmp(disk->fstype, "ext4") != 0 ? NULL : "discard,noinit_itable";
    mkdir(target, 0755);
    if (mount(device.path, target, disk->fstype, disk->readonly ? MS_RDONLY : 0, options) < 0)
        return fail(failure, errno, "cannot mount the disk %s as %s: %s", disk->serial, disk->fstype, strerror(errno));
    if (options)
        disk_fill(device.path, target);
    return 0;
}

static const struct disk *disk_of_role(const struct disk *disks, size_t count, uint64_t role) {
    for (size_t i = 0; i < count; i++)
        if (disks[i].role == role)
            return &disks[i];
    return NULL;
}

/* Mounts image and overlay and the two together on ROOT; returns a descriptor of it or -1. */
static int mount_root(const struct disk *disks, size_t count, struct failure *failure) {
    const struct disk *image = disk_of_role(disks, count, ROLE_IMAGE);
    const struct disk *overlay = disk_of_role(disks, count, ROLE_OVERLAY);
    if (!image || !overlay) {
        fail(failure, EINVAL, "the configuration names no %s disk", image ? "overlay" : "image");
        return -1;
    }
    struct disk lower = *image;
    lower.readonly = true;
    mkdir("/banger", 0700);
    if (mount_disk(&lower, IMAGE, failure) || mount_disk(overlay, OVERLAY, failure))
        return -1;
    mkdir(ROOT, 0755);
    mkdir(OVERLAY "/upper", 0755); /* the mode of the guest's / */
    mkdir(OVERLAY "/work", 0700);
    mkdir(OVERLAY "/volumes", 0700);
    overlay_disk = open(OVERLAY, O_PATH | O_DIRECTORY | O_CLOEXEC);
#define LAYERS "lowerdir=" IMAGE ",upperdir=" OVERLAY "/upper,workdir=" OVERLAY "/work"
    /* redirect_dir lets programs rename directories of the image; kernels built without it refuse the option. */
    if (mount("overlay", ROOT, "overlay", 0, LAYERS ",redirect_dir=on") < 0 &&
        (errno != EINVAL || mount("overlay", ROOT, "overlay", 0, LAYERS) < 0)) {
        fail(failure, errno, "cannot mount the overlay: %s", strerror(errno));
        return -1;
    }
    int root = open(ROOT, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0 || overlay_disk < 0) {
        fail(failure, errno, "cannot open the new root: %s", strerror(errno));
        return -1;
    }
    return root;
}

static int mount_home(const struct disk *disk, int root, struct failure *failure) {
    const char *path = *disk->target ? disk->target : "/root";
    int target = strcmp(path, "/root") == 0 ? system_directory(root, "root", 0700, failure)
                                            : directory_open(root, path, failure);
    if (target < 0)
        return failure->code;
    if (same_directory(target, root) || mount_disk(disk, HOME, failure)) {
        if (same_directory(target, root))
            fail(failure, EINVAL, "%s is the root of the guest: no home disk can be mounted there", path);
        close(target);
        return failure->code;
    }
    int from = openat(target, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int home = open(HOME, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int code = 0;
    if (from < 0 || home < 0)
        code = fail(failure, errno, "cannot open the home disk: %s", strerror(errno));
    else if (!disk->readonly)
        code = seed_home(from, home, failure);
    if (!code && mount_on(target, HOME, NULL, MS_MOVE, NULL) < 0)
        code = fail(failure, errno, "cannot mount the home disk on %s: %s", path, strerror(errno));
    if (!code)
        home_disk = openat(home, ".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    close(from);
    close(home);
    close(target);
    return code;
}

/* Mounts a disk at a path of the guest. */
static int mount_other(const struct disk *disk, int root, const char *target, struct failure *failure) {
    int directory = directory_open(root, target, failure);
    if (directory < 0)
        return failure->code;
    int code = 0;
    if (same_directory(directory, root))
        code = fail(failure, EINVAL, "%s is the root of the guest: no disk can be mounted there", target);
    if (!code)
        code = mount_disk(disk, HOME, failure);
    if (!code && mount_on(directory, HOME, NULL, MS_MOVE, NULL) < 0)
        code = fail(failure, errno, "cannot mount the disk %s on %s: %s", disk->serial, target, strerror(errno));
    close(directory);
    return code;
}

/* One name for a whole path: '/' and '%' become %2F and %25. */
static bool volume_name(const char *path, char *name, size_t size) {
    size_t used = 0;
    for (; *path; path++) {
        bool escape = *path == '/' || *path == '%';
        if (used + 4 > size)
            return false;
        used += (size_t)snprintf(name + used, size - used, escape ? "%%%02X" : "%c", *path);
    }
    return used > 0;
}

/* Makes the volume's directory on the overlay disk, at first a copy of `from`; it gets its name when it is complete. */
static int make_volume(int volumes, const char *name, int from, struct failure *failure) {
    enum { FLAGS = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC };
    if (mkdirat(volumes, "new", 0700) < 0 && errno != EEXIST)
        return fail(failure, errno, "cannot make a volume: %s", strerror(errno));
    int fresh = openat(volumes, "new", FLAGS), source = openat(from, ".", FLAGS);
    int code = 0;
    if (fresh < 0 || source < 0)
        code = fail(failure, errno, "cannot open a volume: %s", strerror(errno));
    if (!code)
        code = remove_contents(fresh, failure);
    if (!code)
        code = copy_tree(source, fresh, failure);
    /* The journal keeps the order of what changes the tree; only data may lag behind the names of files. */
    bool durable = !code && (is_empty(fresh) || syncfs(fresh) == 0);
    if (!code && (!durable || renameat(volumes, "new", volumes, name) < 0))
        code = fail(failure, errno, "cannot complete a volume: %s", strerror(errno));
    close(fresh);
    close(source);
    return code;
}

/* A volume that the image leaves no place for, a file being in the way, is left out: its path says nothing bad. */
static int mount_volume(int root, int volumes, const char *path, struct failure *failure) {
    char name[256], source[300];
    struct failure reason;
    int directory = volume_name(path, name, sizeof name) ? directory_open(root, path, &reason)
                                                         : (fail(&reason, ENAMETOOLONG, "%s is too long", path), -1);
    if (directory >= 0 && same_directory(directory, root)) {
        fail(&reason, EINVAL, "%s is the root of the guest", path);
        close(directory);
        directory = -1;
    }
    if (directory < 0) {
        console_print("no volume: %s", reason.message);
        return 0;
    }
    int code = 0;
    struct stat status;
    if (!code && fstatat(volumes, name, &status, AT_SYMLINK_NOFOLLOW) < 0)
        code = make_volume(volumes, name, directory, failure);
    snprintf(source, sizeof source, OVERLAY "/volumes/%s", name);
    if (!code && mount_on(directory, source, NULL, MS_BIND, NULL) < 0)
        code = fail(failure, errno, "cannot mount the volume %s: %s", path, strerror(errno));
    close(directory);
    return code;
}

static int by_path(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Sorted, so that a volume within another one is mounted after that. */
static int mount_volumes(int root, char **paths, struct failure *failure) {
    size_t count = 0;
    while (paths[count])
        count++;
    qsort(paths, count, sizeof *paths, by_path);
    int volumes = open(OVERLAY "/volumes", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (volumes < 0)
        return fail(failure, errno, "cannot open the volumes of the overlay disk: %s", strerror(errno));
    int code = 0;
    for (; !code && *paths; paths++)
        code = mount_volume(root, volumes, *paths, failure);
    close(volumes);
    return code;
}

/* Images rely on what they have in /run (/run/postgresql, /run/sshd): no container engine mounts anything there. */
static int mount_run(int root, bool own_init, struct failure *failure) {
    int below = system_directory(root, "run", 0755, failure);
    if (below < 0)
        return failure->code;
    if (mount_on(below, "tmpfs", "tmpfs", MS_NOSUID | MS_NODEV | MS_STRICTATIME, "mode=755,size=20%") < 0)
        return fail(failure, errno, "cannot mount /run: %s", strerror(errno));
    int from = openat(below, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int run = openat(root, "run", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    struct failure ignored;
    if (!own_init && from >= 0 && run >= 0 && copy_tree(from, run, &ignored))
        console_print("cannot copy the image's /run: %s", ignored.message);
    close(from);
    close(run);
    close(below);
    return 0;
}

/* A link that programs take for granted; the guest comes up without it, too. */
static void make_link(const char *target, int directory, const char *name) {
    if (symlinkat(target, directory, name) < 0 && errno != EEXIST)
        console_print("cannot make the link %s: %s", name, strerror(errno));
}

/* Moves /dev and /sys into the new root, with what belongs on top of them; /proc comes last, since mounting by
 * descriptor needs it. */
static int move_kernel_mounts(int root, struct failure *failure) {
    static const char *const moved[] = {"sys", "dev", "proc"};
    mkdir("/dev/pts", 0755);
    mkdir("/dev/shm", 01777);
    if (mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666") < 0 ||
        mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_STRICTATIME, "mode=1777") < 0)
        return fail(failure, errno, "cannot mount /dev/pts and /dev/shm: %s", strerror(errno));
    make_link("/proc/self/fd", AT_FDCWD, "/dev/fd");
    make_link("/proc/self/fd/0", AT_FDCWD, "/dev/stdin");
    make_link("/proc/self/fd/1", AT_FDCWD, "/dev/stdout");
    make_link("/proc/self/fd/2", AT_FDCWD, "/dev/stderr");
    if (mount("cgroup2", "/sys/fs/cgroup", "cgroup2", API_FLAGS, "nsdelegate") < 0)
        console_print("cannot mount /sys/fs/cgroup: %s", strerror(errno));
    for (size_t i = 0; i < sizeof moved / sizeof *moved; i++) {
        char source[8];
        snprintf(source, sizeof source, "/%s", moved[i]);
        int directory = system_directory(root, moved[i], 0755, failure);
        if (directory < 0)
            return failure->code;
        if (mount_on(directory, source, NULL, MS_MOVE, NULL) < 0)
            return fail(failure, errno, "cannot move %s into the new root: %s", source, strerror(errno));
        close(directory);
    }
    return 0;
}

/* Directories and links that programs take for granted, for images made from nothing. /tmp stays on the overlay disk:
 * memory is scarcer than disk in a small guest, builds put gigabytes there, and container engines do the same. */
static int complete_root(int root, struct failure *failure) {
    int directory = openat(root, "tmp", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0)
        directory = system_directory(root, "tmp", 01777, failure);
    if (directory < 0)
        return failure->code;
    close(directory);
    if (mkdirat(root, "etc", 0755) == 0 || errno == EEXIST) {
        int etc = openat(root, "etc", O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (etc >= 0) {
            make_link("../proc/self/mounts", etc, "mtab");
            close(etc);
        }
    }
    return 0;
}

int disks_mount(const struct disk *disks, size_t count, char **volumes, bool own_init, struct failure *failure) {
    int root = mount_root(disks, count, failure);
    if (root < 0)
        return failure->code;
    if (complete_root(root, failure) || mount_run(root, own_init, failure) || mount_volumes(root, volumes, failure))
        return failure->code;
    const struct disk *home = disk_of_role(disks, count, ROLE_HOME);
    if (home && mount_home(home, root, failure))
        return failure->code;
    for (size_t i = 0; i < count; i++) {
        struct utsname name;
        char modules[128];
        uname(&name);
        snprintf(modules, sizeof modules, "/lib/modules/%s", name.release);
        if (disks[i].role == ROLE_MODULES && mount_other(&disks[i], root, modules, failure))
            return failure->code;
        if (disks[i].role == ROLE_OTHER && mount_other(&disks[i], root, disks[i].target, failure))
            return failure->code;
    }
    if (move_kernel_mounts(root, failure))
        return failure->code;
    if (fchdir(root) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        return fail(failure, errno, "cannot switch to the new root: %s", strerror(errno));
    close(root);
    /* As on every systemd distribution: container engines in the guest rely on it for their shared volumes. */
    mount(NULL, "/", NULL, MS_REC | MS_SHARED, NULL);
    return 0;
}

int disks_home(void) {
    return home_disk;
}

int disks_of_role(uint64_t role) {
    return role == ROLE_OVERLAY ? overlay_disk : role == ROLE_HOME ? home_disk : -1;
}

void disks_freeze(void) {
    if (overlay_disk < 0)
        return;
    mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
    if (mount_on(overlay_disk, NULL, NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0)
        console_print("cannot make the overlay disk read-only: %s", strerror(errno));
}
