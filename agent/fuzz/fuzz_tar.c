/* Fuzzes tar_extract: whatever the stream holds, nothing beside the directory extracted to may change.
 *
 * That directory begins with links that lead out of it, and a hard-linked file. The mutator repairs the checksums of
 * headers, without which almost no input would get past the first block.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../tar.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

static void require(bool condition, const char *what) {
    if (!condition) {
        fprintf(stderr, "%s: %s\n", what, strerror(errno));
        abort();
    }
}

/* Removes all that is in the directory `fd`, which is closed; its paths may be longer than PATH_MAX. */
static void empty_directory(int fd) {
    DIR *entries = fdopendir(fd);
    require(entries, "fdopendir");
    for (struct dirent *entry; (entry = readdir(entries));) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0 ||
            unlinkat(fd, entry->d_name, 0) == 0)
            continue;
        int child = openat(fd, entry->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        require(child >= 0, "open a directory to empty it");
        empty_directory(child);
        require(unlinkat(fd, entry->d_name, AT_REMOVEDIR) == 0, "rmdir");
    }
    closedir(entries);
}

static size_t count_entries(int parent, const char *name) {
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *entries = fd < 0 ? NULL : fdopendir(fd);
    require(entries, "open a directory to count it");
    size_t count = 0;
    while (readdir(entries))
        count++;
    closedir(entries);
    return count;
}

static bool unchanged(const struct stat *a, const struct stat *b) {
    return a->st_ino == b->st_ino && a->st_mode == b->st_mode && a->st_nlink == b->st_nlink &&
           a->st_uid == b->st_uid && a->st_gid == b->st_gid && a->st_size == b->st_size &&
           a->st_ctim.tv_sec == b->st_ctim.tv_sec && a->st_ctim.tv_nsec == b->st_ctim.tv_nsec;
}

static void make_base(char base[PATH_MAX]) {
    const char *temporary = getenv("TMPDIR");
    snprintf(base, PATH_MAX, "%s/fuzz-tar-XXXXXX", temporary ? temporary : "/tmp");
    require(mkdtemp(base), "mkdtemp");
}

/* Writes a seed: a small tree with a file, a hole, links, a long name and an old time. */
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    const char *seeds = getenv("BANGER_FUZZ_SEEDS");
    if (!seeds)
        return 0;
    char base[PATH_MAX], path[PATH_MAX + 8], long_name[201];
    struct tree_options options = {.flags = TREE_CONTENTS};
    struct failure failure;
    make_base(base);
    memset(long_name, 'n', 200);
    long_name[200] = '\0';
    int directory = open(base, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int hole = openat(directory, "hole", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0640);
    require(hole >= 0 && pwrite(hole, "data", 4, 100000) == 4 && ftruncate(hole, 200000) == 0 &&
                futimens(hole, (struct timespec[2]){{1, 0}, {-5, 250000000}}) == 0 && close(hole) == 0 &&
                mkdirat(directory, "d", 0755) == 0 && symlinkat("../hole", directory, "d/link") == 0 &&
                linkat(directory, "hole", directory, "d/hard", 0) == 0 && mkfifoat(directory, "d/fifo", 0600) == 0 &&
                mknodat(directory, long_name, S_IFREG | 0644, 0) == 0,
            "make a seed");
    snprintf(path, sizeof path, "%s/tree", seeds);
    int out = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    require(out >= 0 && tar_create(out, base, &options, &failure) == 0 && close(out) == 0, "write a seed");
    empty_directory(directory);
    require(rmdir(base) == 0, "rmdir");
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char base[PATH_MAX], target[PATH_MAX + 8];
    struct stat before[3], after[3];
    static const char *const watched[3] = {".", "canary", "canary/file"};
    struct tree_options options = {.set_owner = size & 1, .uid = 1, .gid = 1};
    struct failure failure = {0};
    make_base(base);
    int outside = open(base, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    snprintf(target, sizeof target, "%s/target", base);
    require(outside >= 0 && mkdirat(outside, "canary", 0755) == 0 && mkdirat(outside, "target", 0755) == 0 &&
                mknodat(outside, "canary/file", S_IFREG | 0644, 0) == 0 &&
                symlinkat("../canary", outside, "target/o") == 0 && symlinkat(base, outside, "target/a") == 0 &&
                symlinkat("../canary/file", outside, "target/f") == 0 && symlinkat(".", outside, "target/s") == 0 &&
                mkdirat(outside, "target/d", 0755) == 0 && symlinkat("../..", outside, "target/d/u") == 0,
            "prepare");
    for (size_t i = 0; i < 3; i++)
        require(fstatat(outside, watched[i], &before[i], AT_SYMLINK_NOFOLLOW) == 0, "stat");

    int in = memfd_create("tar", MFD_CLOEXEC);
    require(in >= 0 && write(in, data, size) == (ssize_t)size && lseek(in, 0, SEEK_SET) == 0, "memfd");
    int result = tar_extract(in, target, &options, &failure);
    close(in);
    require(result == 0 || (failure.code > 0 && failure.message[0]), "a failure without a reason");

    for (size_t i = 0; i < 3; i++) {
        require(fstatat(outside, watched[i], &after[i], AT_SYMLINK_NOFOLLOW) == 0, "stat");
        require(unchanged(&before[i], &after[i]), watched[i]);
    }
    require(count_entries(outside, ".") == 4 && count_entries(outside, "canary") == 3, "something new outside");
    empty_directory(outside);
    require(rmdir(base) == 0, "rmdir");
    return 0;
}

/* Repairs the checksum of each header, going from one to the next by their sizes. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    (void)seed;
    size = LLVMFuzzerMutate(data, size, max_size);
    for (size_t position = 0; size - position >= TAR_BLOCK;) {
        struct tar_header *header = (struct tar_header *)(data + position);
        int64_t length;
        if (is_zero(data + position, TAR_BLOCK))
            break;
        snprintf(header->checksum, sizeof header->checksum, "%06o", header_checksum(header));
        position += TAR_BLOCK;
        if (!header_number(header->size, sizeof header->size, &length) || length < 0 ||
            (header->type >= '1' && header->type <= '6'))
            length = 0;
        uint64_t padded = ((uint64_t)length + TAR_BLOCK - 1) / TAR_BLOCK * TAR_BLOCK;
        if (padded > size - position)
            break;
        position += padded;
    }
    return size;
}
