/* Grows the ext4 filesystem of a disk that the host has made larger: at each start, and when it is asked to. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "system.h"

/* EXT4_IOC_RESIZE_FS in fs/ext4/ext4.h of Linux; its argument is the new number of blocks. */
#define RESIZE_FS _IOW('f', 16, uint64_t)

/* Offsets in the superblock, Documentation/filesystems/ext4/super.rst of Linux. */
enum { SUPERBLOCK = 1024, BLOCKS_LOW = 4, LOG_BLOCK_SIZE = 24, MAGIC = 56, INCOMPATIBLE = 96, BLOCKS_HIGH = 336 };
enum { EXT4_MAGIC = 0xEF53, FEATURE_64BIT = 0x80, SECTOR_SIZE = 512 };

static uint64_t little_endian(const uint8_t *bytes, size_t size) {
    uint64_t value = 0;
    while (size > 0)
        value = value << 8 | bytes[--size];
    return value;
}

/* The bytes of the block device below a mounted directory; 0 when nobody says. */
static uint64_t device_size(int directory) {
    struct stat status;
    char path[64], line[32];
    if (fstat(directory, &status) < 0)
        return 0;
    snprintf(path, sizeof path, "/sys/dev/block/%u:%u/size", major(status.st_dev), minor(status.st_dev));
    return read_line(path, line, sizeof line) ? strtoull(line, NULL, 10) * SECTOR_SIZE : 0;
}

uint64_t superblock_size(const uint8_t superblock[1024]) {
    uint64_t log_block_size = little_endian(superblock + LOG_BLOCK_SIZE, 4);
    if (little_endian(superblock + MAGIC, 2) != EXT4_MAGIC || log_block_size > 6)
        return 0;
    uint64_t blocks = little_endian(superblock + BLOCKS_LOW, 4);
    if (little_endian(superblock + INCOMPATIBLE, 4) & FEATURE_64BIT)
        blocks |= little_endian(superblock + BLOCKS_HIGH, 4) << 32;
    return blocks << (10 + log_block_size);
}

/* The new size is where the last whole block of the device ends; a filesystem that has it already is left as it is. */
static int grow(int directory, uint64_t size, struct failure *failure) {
    struct statfs filesystem;
    int opened = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (opened < 0 || fstatfs(opened, &filesystem) < 0) {
        fail(failure, errno, "cannot open the filesystem that is to grow: %s", strerror(errno));
    } else {
        uint64_t blocks = size / (uint64_t)filesystem.f_bsize;
        failure->code = 0;
        if (ioctl(opened, RESIZE_FS, &blocks) < 0)
            fail(failure, errno, "cannot grow a filesystem to %llu blocks: %s", (unsigned long long)blocks,
                 strerror(errno));
    }
    if (opened >= 0)
        close(opened);
    return failure->code;
}

void disk_fill(const char *device, const char *target) {
    uint8_t superblock[1024];
    struct failure failure;
    int disk = open(device, O_RDONLY | O_CLOEXEC), directory = open(target, O_PATH | O_DIRECTORY | O_CLOEXEC);
    bool known = disk >= 0 && pread(disk, superblock, sizeof superblock, SUPERBLOCK) == (ssize_t)sizeof superblock;
    uint64_t now = known ? superblock_size(superblock) : 0, size = directory >= 0 ? device_size(directory) : 0;
    if (now > 0 && size >= now + MIN_GROWTH && grow(directory, size, &failure))
        console_print("%s", failure.message);
    if (disk >= 0)
        close(disk);
    if (directory >= 0)
        close(directory);
}

int call_grow(struct fields *request, struct buffer *reply, struct failure *failure) {
    struct bytes value;
    uint16_t tag;
    uint64_t role = 0;
    while (fields_next(request, &tag, &value))
        if (tag == TAG_ROLE && !value_number(value, &role))
            return fail(failure, EINVAL, "the role of a disk is a number");
    int directory = disks_of_role(role);
    if (directory < 0)
        return fail(failure, ENODEV, "there is no disk of the role %llu that can grow", (unsigned long long)role);
    uint64_t size = device_size(directory);
    if (size == 0 || grow(directory, size, failure))
        return size == 0 ? fail(failure, ENODEV, "the size of the disk is not known") : failure->code;
    put_number(reply, TAG_SIZE, size);
    return 0;
}
