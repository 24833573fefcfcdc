/* Tests where things go in a guest's root, whatever an image has there, in mount namespaces with a root of their own. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../beneath.h"
#include "../system.h"
#include "check.h"

static char scratch[] = "/tmp/test_places.XXXXXX";
static struct failure failure;
static int console; /* what the agent says there */

/* As CHECK, where standard error is the console of the agent. */
#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);                                                     \
            fflush(stdout);                                                                                            \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

static void remove_scratch(void) {
    check_remove_tree(scratch);
}

static int make_root(const char *name) {
    return check_make_directory(scratch, name);
}

static bool is_type(int directory, const char *name, mode_t type) {
    struct stat status;
    return fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) == 0 && (status.st_mode & S_IFMT) == type;
}

static mode_t mode_of(int directory, const char *name) {
    struct stat status;
    CHECK(fstatat(directory, name, &status, 0) == 0);
    return status.st_mode & 07777;
}

static bool exists(int directory, const char *name) {
    struct stat status;
    return fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) == 0;
}

/* True when the directory is the one at `expected`, a path without links. */
static bool is_place(int root, int directory, const char *expected) {
    struct stat found, wanted;
    bool same = directory >= 0 && fstat(directory, &found) == 0 && fstatat(root, expected, &wanted, 0) == 0 &&
                found.st_dev == wanted.st_dev && found.st_ino == wanted.st_ino;
    close(directory);
    return same;
}

static void test_links(void) {
    int outside = make_root("outside"), root = make_root("links");
    char target[256];
    snprintf(target, sizeof target, "%s/outside", scratch);
    CHECK(symlinkat("../outside", root, "relative") == 0 && symlinkat(target, root, "absolute") == 0);
    CHECK(symlinkat("/proc/self/root", root, "magic") == 0 && symlinkat("loop", root, "loop") == 0);
    CHECK(mkdirat(root, "usr", 0755) == 0 && mkdirat(root, "usr/lib", 0755) == 0);
    CHECK(symlinkat("usr/lib", root, "lib") == 0 && symlinkat("/usr/lib", root, "lib64") == 0);
    CHECK(symlinkat("/chain2", root, "chain1") == 0 && symlinkat("usr/../lib64/./end", root, "chain2") == 0);
    CHECK(symlinkat("to-file", root, "twice") == 0 && symlinkat("file", root, "to-file") == 0);
    CHECK(symlinkat("/srv/real", root, "app") == 0 && symlinkat("../../../..", root, "usr/up") == 0);
    write_text(root, "file", "text");

    static const struct {
        const char *path, *place;
    } cases[] = {{"/lib/modules/6.1", "usr/lib/modules/6.1"},
                 {"/lib64/modules", "usr/lib/modules"},
                 {"/../..//new/./x/..", "new"},
                 {"/chain1/x", "usr/lib/end/x"},
                 {"/app/data", "srv/real/data"},
                 {"/app", "srv/real"},
                 {"/usr/up/top", "top"},
                 {"/relative/x", "outside/x"},
                 {"/magic/y", "proc/self/root/y"},
                 {"/", "."}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK(is_place(root, directory_open(root, cases[i].path, &failure), cases[i].place));
    int inside = directory_open(root, "/absolute/x", &failure);
    CHECK(is_place(root, inside, target + 1) == false && exists(root, target + 1));
    static const char *const refused[] = {"/loop", "/loop/x", "/file", "/file/x", "/twice", "/to-file/x", "x", ""};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        failure.code = 0;
        CHECK(directory_open(root, refused[i], &failure) < 0 && failure.code != 0);
    }
    CHECK(!exists(outside, "x") && has_content(root, "file", "text"));
    CHECK(mount_point_open(root, "/usr/up", &failure) < 0 && failure.code == EINVAL);
    close(outside);
    close(root);
}

static void test_leaves(void) {
    int root = make_root("leaves");
    char leaf[NAME_MAX + 1];
    CHECK(mkdirat(root, "etc", 0755) == 0);
    CHECK(symlinkat("../run/systemd/resolve/stub", root, "etc/resolv.conf") == 0);
    CHECK(symlinkat("/etc/resolv.conf", root, "etc/again") == 0 && symlinkat("loop", root, "etc/loop") == 0);
    CHECK(is_place(root, open_parent_in_root(root, "/etc/again", leaf), "run/systemd/resolve"));
    CHECK(strcmp(leaf, "stub") == 0);
    CHECK(is_place(root, open_parent_in_root(root, "/etc/hosts", leaf), "etc") && strcmp(leaf, "hosts") == 0);
    CHECK(open_parent_in_root(root, "/etc/loop", leaf) < 0 && errno == ELOOP);
    CHECK(open_parent_in_root(root, "hosts", leaf) < 0 && errno == EINVAL);
    close(root);
}

/* A guest's root on a tmpfs, as this process's own; false where the host allows no namespaces. */
static bool enter_root(const char *options) {
    if (unshare((geteuid() == 0 ? 0 : CLONE_NEWUSER) | CLONE_NEWNS) < 0) {
        printf("skipped: no mount namespaces here: %s\n", strerror(errno));
        fflush(stdout);
        return false;
    }
    CHECK(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 && mount("tmpfs", scratch, "tmpfs", 0, options) == 0);
    CHECK(chdir(scratch) == 0 && mkdir("proc", 0755) == 0 && mkdir("run", 0755) == 0 && mkdir("dev", 0755) == 0);
    CHECK(mount("/proc", "proc", NULL, MS_BIND | MS_REC, NULL) == 0 && mount("tmpfs", "run", "tmpfs", 0, NULL) == 0);
    CHECK(chroot(".") == 0);
    int ends[2];
    CHECK(pipe2(ends, O_NONBLOCK | O_CLOEXEC) == 0 && dup2(ends[1], STDERR_FILENO) >= 0);
    close(ends[1]);
    console = ends[0];
    return true;
}

/* True when the agent has said this, and nothing else, since this was called last. */
static bool said(const char *text) {
    char line[1024];
    ssize_t length = read(console, line, sizeof line - 1);
    line[length > 0 ? length : 0] = 0;
    if (strcmp(line, text) != 0)
        printf("the agent said: %s\n", line);
    return strcmp(line, text) == 0;
}

static void provide(const char *path, const char *text) {
    struct buffer content = {0};
    buffer_append(&content, text, strlen(text));
    provide_file(path, &content);
    buffer_free(&content);
}

static void in_child(const char *options, void (*test)(void)) {
    fflush(stdout);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        if (enter_root(options))
            test();
        fflush(stdout);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

static void read_only(const char *path, unsigned long flag) {
    EXPECT(mount(path, path, NULL, MS_BIND, NULL) == 0);
    EXPECT(mount(NULL, path, NULL, MS_BIND | MS_REMOUNT | flag, NULL) == 0);
}

static void plain_files(void) {
    provide("/etc/hosts", "first\n"); /* an image without /etc */
    EXPECT(said("") && has_content(AT_FDCWD, "/etc/hosts", "first\n") && mode_of(AT_FDCWD, "/etc/hosts") == 0644);
    EXPECT(unlink("/etc/hosts") == 0 && symlink("../run/systemd/resolve/stub", "/etc/hosts") == 0);
    provide("/etc/hosts", "second\n");
    EXPECT(said("") && is_type(AT_FDCWD, "/etc/hosts", S_IFREG) && has_content(AT_FDCWD, "/etc/hosts", "second\n"));
    EXPECT(!exists(AT_FDCWD, "/run/banger"));
    EXPECT(rename("/etc", "/away") == 0 && symlink("/srv/etc", "/etc") == 0);
    provide("/etc/hosts", "third\n"); /* a dangling link */
    EXPECT(said("") && has_content(AT_FDCWD, "/srv/etc/hosts", "third\n"));
}

static void files_in_the_way(void) {
    EXPECT(mkdir("/etc", 0755) == 0 && mkdir("/etc/hosts", 0755) == 0);
    provide("/etc/hosts", "x");
    EXPECT(said("banger: cannot write /etc/hosts: Is a directory\n") && is_type(AT_FDCWD, "/etc/hosts", S_IFDIR));
    EXPECT(!exists(AT_FDCWD, "/etc/hosts.banger-new"));
    EXPECT(rename("/etc", "/away") == 0);
    write_text(AT_FDCWD, "/etc", "a file");
    provide("/etc/hosts", "x");
    EXPECT(said("banger: cannot make the directory /etc/: Not a directory\n") && has_content(AT_FDCWD, "/etc", "a file"));
    EXPECT(unlink("/etc") == 0 && symlink("etc", "/etc") == 0);
    provide("/etc/hosts", "x");
    EXPECT(said("banger: cannot make the directory /etc/: Too many levels of symbolic links\n"));
}

static void read_only_etc(void) {
    EXPECT(mkdir("/etc", 0755) == 0);
    write_text(AT_FDCWD, "/etc/hosts", "the image's");
    EXPECT(symlink("/run/systemd/resolve/stub", "/etc/resolv.conf") == 0);
    read_only("/etc", MS_RDONLY);
    provide("/etc/hosts", "first, and longer\n");
    EXPECT(said("banger: cannot write /etc/hosts: Read-only file system; a file of /run/banger is mounted there\n"));
    EXPECT(has_content(AT_FDCWD, "/etc/hosts", "first, and longer\n"));
    provide("/etc/hosts", "second\n"); /* the guest is renamed while it runs: into the same mount */
    EXPECT(said("") && has_content(AT_FDCWD, "/etc/hosts", "second\n"));
    EXPECT(has_content(AT_FDCWD, "/run/banger/hosts", "second\n"));
    provide("/etc/resolv.conf", "nameserver\n");
    EXPECT(said("banger: cannot write /etc/resolv.conf: Read-only file system; a file of /run/banger is mounted there\n"));
    EXPECT(has_content(AT_FDCWD, "/etc/resolv.conf", "nameserver\n"));
    provide("/etc/hostname", "name\n"); /* there is nothing to mount it on */
    EXPECT(said("banger: cannot write /etc/hostname: Read-only file system\n"));
    EXPECT(umount("/etc/hosts") == 0 && has_content(AT_FDCWD, "/etc/hosts", "the image's"));
    EXPECT(mount(NULL, "/etc", NULL, MS_BIND | MS_REMOUNT, NULL) == 0);
    provide("/etc/hosts", "third\n"); /* mended */
    EXPECT(said("") && umount("/etc/hosts") < 0 && has_content(AT_FDCWD, "/etc/hosts", "third\n"));
    write_text(AT_FDCWD, "/run/own", "the user's");
    EXPECT(mount("/run/own", "/etc/hosts", NULL, MS_BIND, NULL) == 0);
    provide("/etc/hosts", "fourth\n");
    EXPECT(said("banger: cannot write /etc/hosts: Device or resource busy\n"));
    EXPECT(has_content(AT_FDCWD, "/etc/hosts", "the user's"));
}

/* Blocks and then inodes: the file that is there already gets another one mounted on it. */
static void full_disk(void) {
    EXPECT(mkdir("/etc", 0755) == 0);
    write_text(AT_FDCWD, "/etc/hosts", "the image's");
    int filler = open("/filler", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    char block[4096] = {0};
    while (write(filler, block, sizeof block) > 0)
        ;
    EXPECT(errno == ENOSPC);
    provide("/etc/hosts", "content\n");
    EXPECT(said("banger: cannot write /etc/hosts: No space left on device; a file of /run/banger is mounted there\n"));
    EXPECT(has_content(AT_FDCWD, "/etc/hosts", "content\n"));
    provide("/etc/hostname", "name\n"); /* an empty file takes no block */
    EXPECT(said("banger: cannot write /etc/hostname: No space left on device; a file of /run/banger is mounted there\n"));
    EXPECT(has_content(AT_FDCWD, "/etc/hostname", "name\n"));
    EXPECT(ftruncate(filler, 0) == 0);
    char name[32];
    int file;
    for (int i = 0; (file = (snprintf(name, sizeof name, "/inode%d", i), creat(name, 0600))) >= 0; i++)
        close(file);
    EXPECT(errno == ENOSPC);
    provide("/etc/resolv.conf", "x\n");
    EXPECT(said("banger: cannot write /etc/resolv.conf: No space left on device\n"));
}

static void system_directories(void) {
    EXPECT(mkdir("/guest", 0755) == 0);
    int root = open("/guest", O_PATH | O_DIRECTORY | O_CLOEXEC);
    EXPECT(symlinkat("/var/tmp", root, "tmp") == 0 && symlinkat("loop", root, "loop") == 0);
    EXPECT(symlinkat("/elsewhere", root, "proc") == 0 && mkdirat(root, "elsewhere", 0755) == 0);
    write_text(root, "root", "a file");
    EXPECT(is_place(root, system_directory(root, "tmp", 01777, true, &failure), "var/tmp"));
    EXPECT(mode_of(root, "var/tmp") == 01777 && is_type(root, "tmp", S_IFLNK) && mode_of(root, "var") == 0755);
    EXPECT(fchmodat(root, "var/tmp", 0700, 0) == 0);
    EXPECT(is_place(root, system_directory(root, "tmp", 01777, true, &failure), "var/tmp"));
    EXPECT(mode_of(root, "var/tmp") == 0700); /* what the image has stays as it is */
    EXPECT(is_place(root, system_directory(root, "run", 0755, true, &failure), "run"));
    EXPECT(is_place(root, system_directory(root, "root", 0700, true, &failure), "root"));
    EXPECT(said("banger: /root of the image is no directory: it is /root.replaced now\n"));
    EXPECT(mode_of(root, "root") == 0700 && has_content(root, "root.replaced", "a file"));
    EXPECT(is_place(root, system_directory(root, "loop", 0755, true, &failure), "loop"));
    EXPECT(is_type(root, "loop", S_IFDIR) && is_type(root, "loop.replaced", S_IFLNK));
    EXPECT(is_place(root, system_directory(root, "proc", 0555, false, &failure), "proc"));
    EXPECT(is_type(root, "proc", S_IFDIR) && mode_of(root, "proc") == 0555 && is_type(root, "proc.replaced", S_IFLNK));
    /* nothing is replaced twice: that would remove what was put aside */
    EXPECT(unlinkat(root, "root", AT_REMOVEDIR) == 0);
    write_text(root, "root", "another");
    EXPECT(system_directory(root, "root", 0700, true, &failure) < 0 && failure.code == EEXIST);
    EXPECT(has_content(root, "root", "another") && has_content(root, "root.replaced", "a file"));
    close(root);
}

int main(void) {
    umask(022);
    CHECK(mkdtemp(scratch) != NULL);
    atexit(remove_scratch);
    in_child("size=1m", system_directories);
    in_child("size=1m", plain_files);
    in_child("size=1m", files_in_the_way);
    in_child("size=1m", read_only_etc);
    in_child("size=1m,nr_inodes=100", full_disk);
    test_links();
    test_leaves();
    return 0;
}
