/* Writes tar headers, pax records and the data of files, in blocks of TAR_BUFFER. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <unistd.h>

#include "tar.h"

enum {
    SENDFILE_MIN = 128 * 1024, /* smaller data is copied through the buffer, together with its headers */
    UNSIZED_MAX = 1024 * 1024, /* bytes of a file that does not say how many it has */
};

int writer_failed(struct tar_writer *writer, const char *what) {
    int code = errno;
    return fail(writer->failure, code, "cannot %s %s: %s", what, SHOW(writer->name), strerror(code));
}

int writer_open(struct tar_writer *writer, int out, struct failure *failure) {
    *writer = (struct tar_writer){.out = out, .failure = failure, .data = malloc(TAR_BUFFER)};
    return writer->data ? 0 : fail(failure, ENOMEM, "no memory for making a tar stream");
}

void writer_close(struct tar_writer *writer) {
    free(writer->data);
    free(writer->extents.list);
    buffer_free(&writer->records);
    buffer_free(&writer->map);
}

static int flush(struct tar_writer *writer) {
    for (size_t done = 0; done < writer->used;) {
        ssize_t count = write(writer->out, writer->data + done, writer->used - done);
        if (count < 0 && errno != EINTR)
            return fail(writer->failure, errno, "cannot send the tar stream: %s", strerror(errno));
        done += count > 0 ? (size_t)count : 0;
    }
    writer->used = 0;
    return 0;
}

static int emit(struct tar_writer *writer, const void *data, size_t length) {
    const uint8_t *from = data;
    while (length > 0) {
        size_t room = TAR_BUFFER - writer->used, part = length < room ? length : room;
        memcpy(writer->data + writer->used, from, part);
        writer->used += part;
        from += part;
        length -= part;
        int code = writer->used == TAR_BUFFER ? flush(writer) : 0;
        if (code)
            return code;
    }
    return 0;
}

static int emit_zeros(struct tar_writer *writer, uint64_t length) {
    while (length > 0) {
        size_t room = TAR_BUFFER - writer->used, part = length < room ? (size_t)length : room;
        memset(writer->data + writer->used, 0, part);
        writer->used += part;
        length -= part;
        int code = writer->used == TAR_BUFFER ? flush(writer) : 0;
        if (code)
            return code;
    }
    return 0;
}

static int pad(struct tar_writer *writer, uint64_t length) {
    return emit_zeros(writer, -length % TAR_BLOCK);
}

/* Writes an octal field with its final NUL, or as `pax` record when the number does not fit. */
void writer_octal(struct tar_writer *writer, char *field, size_t size, uint64_t number, const char *pax) {
    char digits[24];
    int length = snprintf(digits, sizeof digits, "%0*llo", (int)size - 1, (unsigned long long)number);
    if ((size_t)length < size) {
        memcpy(field, digits, size);
    } else {
        length = snprintf(digits, sizeof digits, "%llu", (unsigned long long)number);
        pax_append(&writer->records, pax, digits, (size_t)length);
    }
}

void writer_name(struct tar_writer *writer, char *field, size_t size, const char *name, const char *pax) {
    size_t length = strlen(name);
    memcpy(field, name, length < size ? length : size);
    if (length > size)
        pax_append(&writer->records, pax, name, length);
}

void writer_time(struct tar_writer *writer, struct tar_header *header, struct timespec time) {
    bool fits = time.tv_sec >= 0 && time.tv_sec <= 077777777777;
    snprintf(header->mtime, sizeof header->mtime, "%011llo", fits ? (unsigned long long)time.tv_sec : 0);
    if (fits && time.tv_nsec == 0)
        return;
    /* -1.25 s is kept as -2 s and 750,000,000 ns */
    bool negative = time.tv_sec < 0;
    long nanoseconds = negative && time.tv_nsec ? 1000000000 - time.tv_nsec : time.tv_nsec;
    long long seconds = negative ? -(time.tv_sec + (time.tv_nsec > 0)) : time.tv_sec;
    char text[48];
    int length = snprintf(text, sizeof text, "%s%lld.%09ld", negative ? "-" : "", seconds, nanoseconds);
    pax_append(&writer->records, "mtime", text, (size_t)length);
}

static int emit_header(struct tar_writer *writer, struct tar_header *header) {
    memcpy(header->magic, "ustar\0" "00", 8);
    snprintf(header->checksum, sizeof header->checksum, "%06o", header_checksum(header));
    header->checksum[7] = ' ';
    return emit(writer, header, TAR_BLOCK);
}

/* Writes the pax records, if there are any, and the header. */
int writer_member(struct tar_writer *writer, struct tar_header *header) {
    if (writer->records.failed || writer->map.failed)
        return fail(writer->failure, ENOMEM, "no memory for describing %s", SHOW(writer->name));
    if (writer->records.length > MAX_PAX_HEADER)
        return fail(writer->failure, E2BIG, "%s has too many extended attributes", SHOW(writer->name));
    int code = 0;
    if (writer->records.length > 0) {
        struct tar_header extension = {.type = 'x', .mode = "0000644", .uid = "0000000", .gid = "0000000"};
        const char *slash = strrchr(writer->name, '/');
        const char *base = slash && slash[1] ? slash + 1 : writer->name;
        snprintf(extension.name, sizeof extension.name, "PaxHeaders/%.80s", base);
        snprintf(extension.size, sizeof extension.size, "%011zo", writer->records.length);
        memcpy(extension.mtime, header->mtime, sizeof extension.mtime);
        code = emit_header(writer, &extension);
        if (!code)
            code = emit(writer, writer->records.data, writer->records.length);
        if (!code)
            code = pad(writer, writer->records.length);
    }
    return code ? code : emit_header(writer, header);
}

/* Sends `length` bytes from `offset` of the file; zeros for what it no longer has. */
static int emit_data(struct tar_writer *writer, int fd, uint64_t offset, uint64_t length) {
    int code = 0;
    off_t position = (off_t)offset;
    while (length >= SENDFILE_MIN && !writer->no_sendfile) {
        code = flush(writer);
        if (code)
            return code;
        ssize_t count = sendfile(writer->out, fd, &position, length < INT32_MAX ? (size_t)length : INT32_MAX);
        if (count < 0 && (errno == EINVAL || errno == ENOSYS))
            writer->no_sendfile = true; /* not for this kind of file or of `out`: from now on all is copied */
        else if (count < 0 && errno != EINTR && errno != EAGAIN)
            return writer_failed(writer, "send");
        else if (count == 0)
            return emit_zeros(writer, length);
        length -= count > 0 ? (uint64_t)count : 0;
    }
    while (length > 0) {
        size_t room = TAR_BUFFER - writer->used, part = length < room ? (size_t)length : room;
        ssize_t count = pread(fd, writer->data + writer->used, part, position);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return writer_failed(writer, "read");
        if (count == 0)
            return emit_zeros(writer, length);
        writer->used += (size_t)count;
        position += count;
        length -= (uint64_t)count;
        code = writer->used == TAR_BUFFER ? flush(writer) : 0;
        if (code)
            return code;
    }
    return 0;
}

/* Finds the data of a file with holes; no extents when there is none, or the file system cannot tell. */
static int find_extents(struct tar_writer *writer, int fd, const struct stat *status) {
    writer->extents.count = 0;
    if ((uint64_t)status->st_blocks * 512 >= (uint64_t)status->st_size)
        return 0;
    off_t end = 0, size = status->st_size;
    while (end < size) {
        off_t data = lseek(fd, end, SEEK_DATA);
        if (data < 0 && errno != ENXIO) /* ENXIO: only a hole from here on */
            return errno == EINVAL ? 0 : writer_failed(writer, "find the holes of");
        if (data < 0 || data >= size)
            break;
        end = lseek(fd, data, SEEK_HOLE);
        if (end <= data || end > size || writer->extents.count == MAX_EXTENTS - 2)
            end = size;
        if (data == 0 && end == size)
            return 0;
        if (!extents_add(&writer->extents, (uint64_t)data, (uint64_t)(end - data)))
            return fail(writer->failure, ENOMEM, "no memory for the holes of %s", SHOW(writer->name));
    }
    /* An empty extent at the end tells GNU tar the size. */
    return end == size || extents_add(&writer->extents, (uint64_t)size, 0)
               ? 0
               : fail(writer->failure, ENOMEM, "no memory for the holes of %s", SHOW(writer->name));
}

/* The map of a sparse file, padded to blocks, as it stands before the data. */
static void make_map(struct tar_writer *writer) {
    char line[48];
    writer->map.length = 0;
    int length = snprintf(line, sizeof line, "%zu\n", writer->extents.count);
    buffer_append(&writer->map, line, (size_t)length);
    for (size_t i = 0; i < writer->extents.count; i++) {
        length = snprintf(line, sizeof line, "%llu\n%llu\n", (unsigned long long)writer->extents.list[i].offset,
                          (unsigned long long)writer->extents.list[i].length);
        buffer_append(&writer->map, line, (size_t)length);
    }
    buffer_append(&writer->map, (const char[TAR_BLOCK]){0}, -writer->map.length % TAR_BLOCK);
}

/* Whether the size of a file tells what can be read from it: those of /proc have none, those of /sys have a page. */
static bool has_size(const struct stat *status) {
    return status->st_size > 0 && (status->st_blocks > 0 || status->st_size > sysconf(_SC_PAGESIZE));
}

/* Reads a file to its end into writer->map. */
static int read_unsized(struct tar_writer *writer, int fd, const struct stat *status) {
    uint8_t piece[4096];
    writer->map.length = 0;
    while (writer->map.length <= UNSIZED_MAX && !writer->map.failed) {
        ssize_t count = read(fd, piece, sizeof piece);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return writer_failed(writer, "read");
        if (count == 0)
            return 0;
        buffer_append(&writer->map, piece, (size_t)count);
    }
    struct stat now;
    if (writer->map.failed || (fstat(fd, &now) == 0 && now.st_size > status->st_size))
        return 0; /* told by writer_member, or a file that grows */
    return fail(writer->failure, EFBIG, "%s does not say its size and has more than %d bytes", SHOW(writer->name),
                UNSIZED_MAX);
}

static int write_unsized(struct tar_writer *writer, struct tar_header *header, int fd, const struct stat *status) {
    int code = read_unsized(writer, fd, status);
    writer_octal(writer, header->size, sizeof header->size, writer->map.length, "size");
    if (!code)
        code = writer_member(writer, header);
    if (!code)
        code = emit(writer, writer->map.data, writer->map.length);
    return code ? code : pad(writer, writer->map.length);
}

int writer_file(struct tar_writer *writer, struct tar_header *header, int fd, const struct stat *status) {
    if (!has_size(status))
        return write_unsized(writer, header, fd, status);
    uint64_t size = (uint64_t)status->st_size, stored = size;
    int code = find_extents(writer, fd, status);
    if (code)
        return code;
    if (writer->extents.count > 0) {
        char digits[24];
        int length = snprintf(digits, sizeof digits, "%llu", (unsigned long long)size);
        make_map(writer);
        stored = writer->map.length;
        for (size_t i = 0; i < writer->extents.count; i++)
            stored += writer->extents.list[i].length;
        pax_append(&writer->records, "GNU.sparse.major", "1", 1);
        pax_append(&writer->records, "GNU.sparse.minor", "0", 1);
        pax_append(&writer->records, "GNU.sparse.name", writer->name, strlen(writer->name));
        pax_append(&writer->records, "GNU.sparse.realsize", digits, (size_t)length);
    }
    writer_octal(writer, header->size, sizeof header->size, stored, "size");
    code = writer_member(writer, header);
    if (!code && writer->extents.count == 0)
        code = emit_data(writer, fd, 0, size);
    if (!code && writer->extents.count > 0)
        code = emit(writer, writer->map.data, writer->map.length);
    for (size_t i = 0; i < writer->extents.count && !code; i++)
        code = emit_data(writer, fd, writer->extents.list[i].offset, writer->extents.list[i].length);
    return code ? code : pad(writer, stored);
}

int writer_finish(struct tar_writer *writer) {
    int code = emit_zeros(writer, 2 * TAR_BLOCK);
    return code ? code : flush(writer);
}
