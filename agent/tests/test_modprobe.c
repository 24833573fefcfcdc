/* Tests what a name asks the kernel's modprobe for, by indexes such as depmod(8) makes, and others. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../system.h"
#include "check.h"

static char scratch[] = "/tmp/test_modprobe.XXXXXX";
static int modules;
static char loaded[1024];
static int refused; /* what loading "bad.ko" ends with */

static void remove_scratch(void) {
    check_remove_tree(scratch);
}

static int record(int directory, const char *path) {
    CHECK(directory == modules);
    if (strstr(path, "bad.ko"))
        return refused;
    strcat(strcat(loaded, *loaded ? " " : ""), path);
    return 0;
}

static void write_index(const char *name, const char *text) {
    int fd = openat(modules, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    close(fd);
}

/* True when the name ends with `code` and has these files loaded in this order. */
static bool loads(const char *name, int code, const char *files) {
    *loaded = 0;
    int found = modprobe(modules, name, record);
    if (found != code || strcmp(loaded, files) != 0)
        fprintf(stderr, "%s: %s, loaded '%s'\n", name, strerror(found), loaded);
    return found == code && strcmp(loaded, files) == 0;
}

static void test_names(void) {
    write_index("modules.dep", "kernel/fs/fuse/fuse.ko:\n"
                               "kernel/fs/btrfs/btrfs.ko: kernel/lib/raid6.ko kernel/crypto/xor-blocks.ko\n"
                               "kernel/crypto/sha256-glue.ko.xz: kernel/crypto/base.ko.xz\n"
                               "kernel/crypto/crc32c_generic.ko:\nkernel/crypto/crc32c-intel.ko:\n"
                               "kernel/bad.ko:\nkernel/one.ko.zst:\n");
    write_index("modules.alias", "# Aliases extracted from modules themselves.\n"
                                 "alias devname:fuse fuse\nalias char-major-10-229 fuse\nalias fs-btrfs btrfs\n"
                                 "alias crypto-crc32c crc32c_intel\nalias crypto-crc32c crc32c_generic\n"
                                 "alias sha256 sha256-glue\nalias cpu:type:x86,ven*fam*mod*:feature:*0080* crc32c_intel\n"
                                 "alias pci:v00001AF4d*sv*sd*bc[0-9]*sc*i* one\nalias mixed bad\nalias mixed one\n"
                                 "alias only bad\nalias gone missing\nalias\nalias short\nsoftdep fuse pre: one\n");
    write_index("modules.softdep", "softdep btrfs pre: crypto-crc32c sha256 missing post: one\nsoftdep fuse one\n"
                                   "softdep one pre: one\n");
    write_index("modules.builtin", "kernel/fs/ext4/ext4.ko\nkernel/net/ipv6/ipv6-core.ko\n");
    write_index("modules.symbols", "alias symbol:fuse_do_open fuse\n");
    CHECK(loads("fuse", 0, "kernel/fs/fuse/fuse.ko") && loads("devname:fuse", 0, "kernel/fs/fuse/fuse.ko"));
    CHECK(loads("char-major-10-229", 0, "kernel/fs/fuse/fuse.ko"));
    CHECK(loads("symbol:fuse_do_open", 0, "kernel/fs/fuse/fuse.ko"));
    CHECK(loads("crc32c-generic", 0, "kernel/crypto/crc32c_generic.ko"));
    CHECK(loads("crypto-crc32c", 0, "kernel/crypto/crc32c-intel.ko kernel/crypto/crc32c_generic.ko"));
    CHECK(loads("sha256_glue", 0, "kernel/crypto/base.ko.xz kernel/crypto/sha256-glue.ko.xz"));
    CHECK(loads("cpu:type:x86,ven0000fam0006mod0037:feature:,0034,0080,0081", 0, "kernel/crypto/crc32c-intel.ko"));
    CHECK(loads("pci:v00001AF4d00001000sv0sd0bc02sc00i00", 0, "kernel/one.ko.zst"));
    CHECK(loads("fs-btrfs", 0,
                "kernel/crypto/crc32c-intel.ko kernel/crypto/crc32c_generic.ko kernel/crypto/base.ko.xz "
                "kernel/crypto/sha256-glue.ko.xz kernel/crypto/xor-blocks.ko kernel/lib/raid6.ko "
                "kernel/fs/btrfs/btrfs.ko kernel/one.ko.zst"));
    CHECK(loads("ext4", 0, "") && loads("ipv6_core", 0, ""));
    CHECK(loads("nothing", ENOENT, "") && loads("", ENOENT, "") && loads("gone", ENOENT, "") && loads("fs-*", ENOENT, ""));
    refused = ENOKEY;
    CHECK(loads("bad", ENOKEY, "") && loads("only", ENOKEY, "") && loads("mixed", 0, "kernel/one.ko.zst"));
    char longest[400];
    memset(longest, 'x', sizeof longest);
    longest[sizeof longest - 1] = 0;
    CHECK(loads(longest, ENAMETOOLONG, ""));
}

/* Nothing outside of the directory is opened, and no line takes more than its share. */
static void test_hostile(void) {
    write_index("modules.dep", "/etc/evil.ko:\n../../evil2.ko:\nkernel/evil3.ko: kernel/../../x.ko\nevil4.ko: /x.ko\n"
                               ":\n\nno-colon.ko\nname:\n.ko:\n");
    CHECK(loads("evil", EINVAL, "") && loads("evil2", EINVAL, "") && loads("evil3", EINVAL, ""));
    CHECK(loads("evil4", EINVAL, "") && loads("no_colon", 0, "no-colon.ko") && loads("name", ENOENT, ""));
    static char many[200000];
    strcpy(many, "many.ko:");
    for (size_t i = 0; i < 300; i++)
        strcat(many, " a.ko");
    strcat(many, "\nlong.ko:");
    size_t used = strlen(many);
    memset(many + used, 'a', 100000);
    strcpy(many + used + 100000, "\nafter.ko:\nlast.ko:");
    write_index("modules.dep", many);
    CHECK(loads("many", EINVAL, "") && loads("long", ENOENT, "") && loads("after", 0, "after.ko"));
    CHECK(loads("last", 0, "last.ko"));
    write_index("modules.dep", "a.ko:\nb.ko:\n");
    write_index("modules.softdep", "softdep a pre: b\nsoftdep b pre: a\n"); /* a circle ends */
    CHECK(modprobe(modules, "a", record) == 0);
    static const char *const names[] = {"modules.dep", "modules.alias", "modules.softdep", "modules.builtin",
                                        "modules.symbols"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        CHECK(unlinkat(modules, names[i], 0) == 0);
    CHECK(loads("a", ENOENT, ""));
}

int main(void) {
    CHECK(mkdtemp(scratch) != NULL);
    atexit(remove_scratch);
    modules = open(scratch, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(modules >= 0);
    test_names();
    test_hostile();
    close(modules);
    return 0;
}
