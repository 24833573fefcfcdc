/* Mounts the guest's disks and builds its root filesystem: image, overlay, home, modules, volumes. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
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

/* Files on the overlay disk that hold inodes. */
static void hold_inodes(bool hold) {
    enum { INODES = 4 };
    mkdir(OVERLAY "/reserve", 0700);
    for (int i = 0; i < INODES; i++) {
        char path[64];
        snprintf(path, sizeof path, OVERLAY "/reserve/%d", i);
        if (hold)
            mknod(path, S_IFREG | 0600, 0);
        else
            unlink(path);
    }
}

static int mount_layers(void) {
#define LAYERS "lowerdir=" IMAGE ",upperdir=" OVERLAY "/upper,workdir=" OVERLAY "/work"
    /* redirect_dir lets programs rename directories of the image; kernels built without it refuse the option. */
    int result = mount("overlay", ROOT, "overlay", 0, LAYERS ",redirect_dir=on");
    return result < 0 && errno == EINVAL ? mount("overlay", ROOT, "overlay", 0, LAYERS) : result;
}

/* The guest's / is the upper directory: it begins as that of the image, and is what the guest makes of it from then on.
 * It gets its name when it is complete. */
static int make_upper(struct failure *failure) {
    struct stat image;
    if (access(OVERLAY "/upper", F_OK) == 0)
        return 0;
    if (stat(IMAGE, &image) < 0 || (mkdir(OVERLAY "/new", 0700) < 0 && errno != EEXIST) ||
        chown(OVERLAY "/new", image.st_uid, image.st_gid) < 0 || chmod(OVERLAY "/new", image.st_mode & 07777) < 0 ||
        rename(OVERLAY "/new", OVERLAY "/upper") < 0)
        return fail(failure, errno, "cannot make the overlay's upper directory: %s", strerror(errno));
    return 0;
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
    if (make_upper(failure))
        return -1;
    mkdir(OVERLAY "/work", 0700);
    mkdir(OVERLAY "/volumes", 0700);
    overlay_disk = open(OVERLAY, O_PATH | O_DIRECTORY | O_CLOEXEC);
    /* The overlay needs some inodes for its own trials; a user who has taken all must be able to give some back. */
    hold_inodes(true);
    int mounted = mount_layers();
    if (mounted < 0 && errno == ENOSPC) {
        hold_inodes(false);
        mounted = mount_layers();
        int code = errno;
        hold_inodes(true);
        errno = code;
    }
    if (mounted < 0) {
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

/* Where something that holds data is mounted: it can be reached also when its place cannot be made. */
static int place_open(int root, const char *path, const char *spare, struct failure *failure) {
    int place = mount_point_open(root, path, failure);
    if (place < 0) {
        console_print("%s; what belongs there is mounted on %s instead", failure->message, spare);
        place = directory_open(root, spare, failure);
    }
    return place;
}

static int mount_home(const struct disk *disk, int root, struct failure *failure) {
    const char *path = *disk->target ? disk->target : "/root";
    if (strcmp(path, "/root") == 0) /* whatever else is there is put aside, and what is missing gets its usual mode */
        close(system_directory(root, "root", 0700, true, failure));
    int target = place_open(root, path, SPARE_PLACES "home", failure);
    if (target < 0 || mount_disk(disk, HOME, failure))
        return failure->code;
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
static int mount_other(const struct disk *disk, int root, const char *target, const char *spare,
                       struct failure *failure) {
    int directory = place_open(root, target, spare, failure);
    if (directory < 0)
        return failure->code;
    int code = mount_disk(disk, HOME, failure);
    if (!code && mount_on(directory, HOME, NULL, MS_MOVE, NULL) < 0)
        code = fail(failure, errno, "cannot mount the disk %s on %s: %s", disk->serial, target, strerror(errno));
    close(directory);
    return code;
}

/* A guest without modules has what its kernel has built in. */
static void mount_modules(const struct disk *disk, int root) {
    struct utsname name;
    char path[128];
    struct failure failure;
    uname(&name);
    snprintf(path, sizeof path, MODULES "%s", name.release);
    if (mount_other(disk, root, path, SPARE_MODULES, &failure))
        console_print("no kernel modules: %s", failure.message);
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

/* A volume that the image leaves no place for, a file being in the way, is left out: its path says nothing bad. So is a
 * new one that cannot be made, since the disk is full: what is written there stays on the same disk. One that holds data
 * already is never just missing: a program would begin anew. */
static int mount_volume(int root, int volumes, const char *path, struct failure *failure) {
    char name[256] = "", source[300], spare[300];
    struct failure reason = {ENAMETOOLONG, "its path is too long"};
    struct stat status;
    bool named = volume_name(path, name, sizeof name);
    bool there = named && fstatat(volumes, name, &status, AT_SYMLINK_NOFOLLOW) == 0;
    snprintf(spare, sizeof spare, SPARE_PLACES "volumes/%s", name);
    int directory = there   ? place_open(root, path, spare, &reason)
                    : named ? mount_point_open(root, path, &reason)
                            : -1;
    int code = 0;
    if (directory < 0 || (!there && make_volume(volumes, name, directory, &reason))) {
        console_print("no volume at %s: %s", path, reason.message);
    } else {
        snprintf(source, sizeof source, OVERLAY "/volumes/%s", name);
        if (mount_on(directory, source, NULL, MS_BIND, NULL) < 0)
            code = fail(failure, errno, "cannot mount the volume %s: %s", path, strerror(errno));
    }
    if (directory >= 0)
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
static void mount_run(int root, bool own_init) {
    struct failure failure;
    int below = system_directory(root, "run", 0755, true, &failure);
    if (below >= 0 && same_directory(below, root)) {
        fail(&failure, EINVAL, "/run is the root of the guest");
    } else if (below >= 0 &&
               mount_on(below, "tmpfs", "tmpfs", MS_NOSUID | MS_NODEV | MS_STRICTATIME, "mode=755,size=20%") < 0) {
        fail(&failure, errno, "cannot mount /run: %s", strerror(errno));
    } else if (below >= 0) {
        int from = openat(below, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        int run = directory_open(root, "/run", &failure), opened = openat(run, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (!own_init && copy_tree(from, opened, &failure))
            console_print("cannot copy the image's /run: %s", failure.message);
        close(from);
        close(run);
        close(opened);
        close(below);
        return;
    }
    console_print("%s", failure.message);
    close(below);
}

/* A link that programs take for granted; the guest comes up without it, too. */
static void make_link(const char *target, int directory, const char *name) {
    if (symlinkat(target, directory, name) < 0 && errno != EEXIST)
        console_print("cannot make the link %s: %s", name, strerror(errno));
}

static void mount_beside(const char *type, const char *target, unsigned long flags, const char *options) {
    mkdir(target, 0755);
    if (mount(type, target, type, flags, options) < 0)
        console_print("cannot mount %s on %s: %s", type, target, strerror(errno));
}

/* What belongs on top of /dev and /sys, in every container engine as well. */
static void complete_kernel_mounts(void) {
    mount_beside("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666");
    mount_beside("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV | MS_STRICTATIME, "mode=1777");
    mount_beside("mqueue", "/dev/mqueue", API_FLAGS, NULL);
    mount_beside("cgroup2", "/sys/fs/cgroup", API_FLAGS, "nsdelegate");
    make_link("/proc/self/fd", AT_FDCWD, "/dev/fd");
    make_link("/proc/self/fd/0", AT_FDCWD, "/dev/stdin");
    make_link("/proc/self/fd/1", AT_FDCWD, "/dev/stdout");
    make_link("/proc/self/fd/2", AT_FDCWD, "/dev/stderr");
    make_link("/proc/kcore", AT_FDCWD, "/dev/core");
}

/* Moves /dev and /sys into the new root; /proc comes last, since mounting by descriptor needs it. All three have to be
 * just there, so a link is not followed. */
static int move_kernel_mounts(int root, struct failure *failure) {
    static const char *const moved[] = {"sys", "dev", "proc"};
    for (size_t i = 0; i < sizeof moved / sizeof *moved; i++) {
        char source[8];
        snprintf(source, sizeof source, "/%s", moved[i]);
        int directory = system_directory(root, moved[i], 0755, false, failure);
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
static void complete_root(int root) {
    struct failure failure;
    int directory = system_directory(root, "tmp", 01777, true, &failure);
    if (directory < 0)
        console_print("%s", failure.message);
    else
        close(directory);
    int etc = directory_open(root, "/etc", &failure);
    if (etc < 0) {
        console_print("%s", failure.message);
        return;
    }
    make_link("../proc/self/mounts", etc, "mtab");
    close(etc);
}

int disks_mount(const struct disk *disks, size_t count, char **volumes, bool own_init, struct failure *failure) {
    int root = mount_root(disks, count, failure);
    if (root < 0)
        return failure->code;
    complete_root(root);
    mount_run(root, own_init);
    if (mount_volumes(root, volumes, failure))
        return failure->code;
    const struct disk *home = disk_of_role(disks, count, ROLE_HOME);
    if (home && mount_home(home, root, failure))
        return failure->code;
    for (size_t i = 0; i < count; i++) {
        char spare[128];
        snprintf(spare, sizeof spare, SPARE_PLACES "%s", disks[i].serial);
        if (disks[i].role == ROLE_MODULES)
            mount_modules(&disks[i], root);
        if (disks[i].role == ROLE_OTHER && mount_other(&disks[i], root, disks[i].target, spare, failure))
            return failure->code;
    }
    complete_kernel_mounts();
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
