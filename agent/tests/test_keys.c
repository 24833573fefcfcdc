/* Tests banger's lines in authorized_keys: what they replace, whose they are, and what must not lead elsewhere. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../system.h"
#include "check.h"

#define BEGIN "# banger: the keys from here on are written by banger\n"
#define END "# banger: your own keys may follow\n"
#define FILE_NAME ".ssh/authorized_keys"

enum { USER = 12345, GROUP = 54321 };

static char scratch[] = "/tmp/test_keys.XXXXXX";
static char *keys[] = {"ssh-ed25519 A a", "ssh-ed25519 B b", NULL};
static char *fewer[] = {"ssh-ed25519 C c", NULL};

static void remove_scratch(void) {
    check_remove_tree(scratch);
}

static int make_home(const char *name) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", scratch, name);
    CHECK(mkdir(path, 0755) == 0);
    int home = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    CHECK(home >= 0 && (geteuid() != 0 || chown(path, USER, GROUP) == 0));
    return home;
}

static void write_owned(int directory, const char *name, const char *text) {
    int fd = openat(directory, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    CHECK(geteuid() != 0 || fchown(fd, USER, GROUP) == 0);
    close(fd);
}

static void make_directory(int home, const char *name) {
    CHECK(mkdirat(home, name, 0755) == 0 && (geteuid() != 0 || fchownat(home, name, USER, GROUP, 0) == 0));
}

static struct stat status_of(int directory, const char *name) {
    struct stat status;
    CHECK(fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) == 0);
    return status;
}

static bool is_owned(int home, const char *name, mode_t mode) {
    struct stat status = status_of(home, name);
    return status.st_mode == mode && (geteuid() != 0 || (status.st_uid == USER && status.st_gid == GROUP));
}

static bool exists(int directory, const char *name) {
    return faccessat(directory, name, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

static int refusal(int home) {
    struct failure failure = {0};
    int code = keys_write(home, keys, &failure);
    CHECK(code == failure.code && (code == 0 || *failure.message));
    return code;
}

static void check_lines(const char *old, char **lines, const char *expected) {
    struct buffer result = {0};
    replace_managed_lines(old, lines, &result);
    CHECK(!result.failed && result.length == strlen(expected) && memcmp(result.data, expected, result.length) == 0);
    buffer_free(&result);
}

static void test_lines(void) {
    check_lines("", keys, BEGIN "ssh-ed25519 A a\nssh-ed25519 B b\n" END);
    check_lines("own 1\n\n" BEGIN "ssh-ed25519 A a\nssh-ed25519 B b\n" END "own 2", fewer,
                "own 1\n\nown 2\n" BEGIN "ssh-ed25519 C c\n" END);
    check_lines("own\n" BEGIN "cut off", fewer, "own\n" BEGIN "ssh-ed25519 C c\n" END);
}

static void test_written(void) {
    struct failure failure;
    int home = make_home("new");
    CHECK(keys_write(home, keys, &failure) == 0);
    CHECK(has_content(home, FILE_NAME, BEGIN "ssh-ed25519 A a\nssh-ed25519 B b\n" END));
    CHECK(is_owned(home, ".ssh", S_IFDIR | 0700) && is_owned(home, FILE_NAME, S_IFREG | 0600));
    /* what is there already is not written again: the disk may be full */
    struct stat before = status_of(home, FILE_NAME);
    CHECK(keys_write(home, keys, &failure) == 0 && status_of(home, FILE_NAME).st_ino == before.st_ino);
    close(home);

    home = make_home("used");
    make_directory(home, ".ssh");
    write_owned(home, FILE_NAME, "own\n");
    write_owned(home, FILE_NAME ".banger-new", "left by an earlier one");
    CHECK(fchmodat(home, FILE_NAME, 0644, 0) == 0 && keys_write(home, fewer, &failure) == 0);
    CHECK(has_content(home, FILE_NAME, "own\n" BEGIN "ssh-ed25519 C c\n" END) && !exists(home, FILE_NAME ".banger-new"));
    CHECK(is_owned(home, ".ssh", S_IFDIR | 0700) && is_owned(home, FILE_NAME, S_IFREG | 0600));
    close(home);
}

/* Links, fifos and the like are neither followed nor changed. */
static void test_in_the_way(void) {
    int outside = make_home("outside"), home = make_home("linked");
    write_owned(outside, "precious", "precious");
    CHECK(symlinkat("../outside", home, ".ssh") == 0 && refusal(home) == ENOTDIR);
    CHECK(!exists(outside, "authorized_keys") && S_ISLNK(status_of(home, ".ssh").st_mode));
    CHECK(unlinkat(home, ".ssh", 0) == 0);
    write_owned(home, ".ssh", "file");
    CHECK(refusal(home) == ENOTDIR && unlinkat(home, ".ssh", 0) == 0);
    make_directory(home, ".ssh");
    CHECK(symlinkat("../../outside/precious", home, FILE_NAME) == 0 && refusal(home) == ELOOP);
    CHECK(has_content(outside, "precious", "precious") && unlinkat(home, FILE_NAME, 0) == 0);
    CHECK(mkfifoat(home, FILE_NAME, 0600) == 0 && (geteuid() != 0 || fchownat(home, FILE_NAME, USER, GROUP, 0) == 0));
    CHECK(refusal(home) == EINVAL && unlinkat(home, FILE_NAME, 0) == 0);
    make_directory(home, FILE_NAME);
    CHECK(refusal(home) == EINVAL && unlinkat(home, FILE_NAME, AT_REMOVEDIR) == 0);
    make_directory(home, FILE_NAME ".banger-new");
    CHECK(refusal(home) == EEXIST && unlinkat(home, FILE_NAME ".banger-new", AT_REMOVEDIR) == 0);
    CHECK(symlinkat("../../outside/precious", home, FILE_NAME ".banger-new") == 0 && refusal(home) == 0);
    CHECK(has_content(outside, "precious", "precious") && is_owned(home, FILE_NAME, S_IFREG | 0600));
    int file = openat(home, FILE_NAME, O_WRONLY | O_TRUNC | O_CLOEXEC);
    CHECK(file >= 0 && ftruncate(file, 2 << 20) == 0 && refusal(home) == EFBIG);
    close(file);
    close(home);
    close(outside);
}

/* What the user may not read or write is not read or written for him. */
static void test_as_the_owner(void) {
    if (geteuid() != 0) {
        printf("skipped: files of other users need root\n");
        return;
    }
    int home = make_home("foreign");
    make_directory(home, ".ssh");
    write_owned(home, FILE_NAME, "secret\n");
    CHECK(fchownat(home, FILE_NAME, 0, 0, 0) == 0 && refusal(home) == EACCES);
    CHECK(has_content(home, FILE_NAME, "secret\n") && status_of(home, FILE_NAME).st_uid == 0);
    CHECK(unlinkat(home, FILE_NAME, 0) == 0 && fchownat(home, ".ssh", 0, 0, 0) == 0 && refusal(home) == EACCES);
    CHECK(!exists(home, FILE_NAME) && status_of(home, ".ssh").st_uid == 0);
    /* and afterwards this process is root again */
    write_owned(home, ".ssh/root", "root's");
    CHECK(fchownat(home, ".ssh/root", 0, 0, 0) == 0);
    close(home);
}

int main(void) {
    umask(022);
    CHECK(mkdtemp(scratch) != NULL && chmod(scratch, 0755) == 0);
    atexit(remove_scratch);
    test_lines();
    test_written();
    test_in_the_way();
    test_as_the_owner();
    return 0;
}
