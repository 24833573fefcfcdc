/* Reads a tar stream member by member: ustar, pax, GNU long names, GNU and pax sparse files. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "tar.h"

int reader_open(struct tar_reader *reader, int in, struct failure *failure) {
    *reader = (struct tar_reader){.in = in, .failure = failure, .data = malloc(TAR_BUFFER)};
    return reader->data ? 0 : fail(failure, ENOMEM, "no memory for reading the tar stream");
}

void reader_close(struct tar_reader *reader) {
    free(reader->data);
    free(reader->member.extents.list);
    buffer_free(&reader->records);
    buffer_free(&reader->global);
}

/* Reads what fits into the buffer; *got is 0 at the end of the stream. */
static int fill(struct tar_reader *reader, size_t *got) {
    memmove(reader->data, reader->data + reader->start, reader->end - reader->start);
    reader->end -= reader->start;
    reader->start = 0;
    ssize_t count;
    do
        count = read(reader->in, reader->data + reader->end, TAR_BUFFER - reader->end);
    while (count < 0 && errno == EINTR);
    if (count < 0)
        return fail(reader->failure, errno, "cannot read the tar stream: %s", strerror(errno));
    reader->end += (size_t)count;
    *got = (size_t)count;
    return 0;
}

static int need(struct tar_reader *reader, size_t length) {
    while (reader->end - reader->start < length) {
        size_t got;
        int code = fill(reader, &got);
        if (code)
            return code;
        if (got > 0)
            continue;
        if (reader->member.name[0])
            return fail(reader->failure, EBADMSG, "the tar stream ends early, in or after %s",
                        SHOW(reader->member.name));
        return fail(reader->failure, EBADMSG, "the tar stream ends before its first member");
    }
    return 0;
}

static int skip(struct tar_reader *reader, uint64_t length) {
    while (length > 0) {
        int code = need(reader, 1);
        if (code)
            return code;
        size_t available = reader->end - reader->start;
        size_t taken = length < available ? (size_t)length : available;
        reader->start += taken;
        length -= taken;
    }
    return 0;
}

static uint64_t padding_of(uint64_t length) {
    return -length % TAR_BLOCK;
}

int reader_data(struct tar_reader *reader, size_t least, struct bytes *data) {
    int code = need(reader, least);
    size_t available = reader->end - reader->start;
    *data = (struct bytes){reader->data + reader->start,
                           available < reader->member.stored ? available : (size_t)reader->member.stored};
    return code;
}

void reader_take(struct tar_reader *reader, size_t length) {
    reader->start += length;
    reader->member.stored -= length;
}

int reader_drain(struct tar_reader *reader) {
    size_t got;
    int code;
    do {
        reader->start = reader->end;
        code = fill(reader, &got);
    } while (!code && got > 0);
    return code;
}

static int corrupt(struct tar_reader *reader, const char *what) {
    if (reader->member.name[0])
        return fail(reader->failure, EBADMSG, "corrupt tar stream at %s: %s", SHOW(reader->member.name), what);
    return fail(reader->failure, EBADMSG, "corrupt tar stream at its beginning: %s", what);
}

/* Reads `size` bytes of an extended header and its padding to the end of `buffer`. */
static int read_extended(struct tar_reader *reader, struct buffer *buffer, uint64_t size, size_t limit) {
    if (size > limit || buffer->length > limit - size)
        return corrupt(reader, "its extended header is too large");
    uint64_t left = size;
    while (left > 0) {
        int code = need(reader, 1);
        if (code)
            return code;
        size_t available = reader->end - reader->start;
        size_t taken = left < available ? (size_t)left : available;
        buffer_append(buffer, reader->data + reader->start, taken);
        reader->start += taken;
        left -= taken;
    }
    if (buffer->failed)
        return fail(reader->failure, ENOMEM, "no memory for an extended header of the tar stream");
    return skip(reader, padding_of(size));
}

/* A GNU long name: its bytes up to the first NUL. */
static int read_long_name(struct tar_reader *reader, uint64_t size, char name[PATH_MAX]) {
    struct buffer buffer = {0};
    int code = read_extended(reader, &buffer, size, PATH_MAX);
    size_t length = code || !buffer.length ? 0 : strnlen((const char *)buffer.data, buffer.length);
    if (!code && length == PATH_MAX)
        code = corrupt(reader, "a name is too long");
    if (!code) {
        memcpy(name, buffer.length ? (const char *)buffer.data : "", length);
        name[length] = '\0';
    }
    buffer_free(&buffer);
    return code;
}

/* The pax records that matter here. A value of a later record replaces an earlier one, an empty one removes it. */
enum pax_key {
    PAX_PATH, PAX_LINKPATH, PAX_SIZE, PAX_UID, PAX_GID, PAX_MTIME,
    PAX_SPARSE_MAJOR, PAX_SPARSE_MINOR, PAX_SPARSE_NAME, PAX_SPARSE_REALSIZE,
    PAX_SPARSE_SIZE, PAX_SPARSE_MAP, PAX_SPARSE_OFFSET, PAX_SPARSE_NUMBYTES, PAX_KEYS,
};
static const char *const pax_keys[PAX_KEYS] = {
    "path", "linkpath", "size", "uid", "gid", "mtime",
    "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.name", "GNU.sparse.realsize",
    "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.offset", "GNU.sparse.numbytes",
};

static int parse_records(struct tar_reader *reader, const struct buffer *records, struct bytes values[PAX_KEYS]) {
    struct bytes rest = {records->data, records->length}, key, value;
    bool bad = false;
    while (pax_next(&rest, &key, &value, &bad)) {
        enum pax_key known = 0;
        while (known < PAX_KEYS && !bytes_equal(key, pax_keys[known]))
            known++;
        if (known == PAX_KEYS)
            continue;
        values[known] = value;
        if (known == PAX_SPARSE_NUMBYTES) { /* sparse format 0.0: pairs of offset and numbytes */
            uint64_t offset, length;
            if (!decimal_number(values[PAX_SPARSE_OFFSET], &offset) || !decimal_number(value, &length) ||
                !extents_add(&reader->member.extents, offset, length))
                return corrupt(reader, "bad sparse map");
        }
    }
    return bad ? corrupt(reader, "malformed pax record") : 0;
}

/* Copies a name of a pax record; `name` keeps its value when there is none. */
static int override_name(struct tar_reader *reader, struct bytes value, char name[PATH_MAX]) {
    if (value.length == 0)
        return 0;
    if (value.length >= PATH_MAX || memchr(value.data, '\0', value.length))
        return corrupt(reader, "a name that is too long or holds a NUL");
    memcpy(name, value.data, value.length);
    name[value.length] = '\0';
    return 0;
}

/* A number that a pax record gives, or else the header's field. */
static bool number_of(struct bytes value, const char *field, size_t size, uint64_t limit, uint64_t *number) {
    int64_t small;
    if (value.length)
        return decimal_number(value, number) && *number <= limit;
    if (!header_number(field, size, &small) || small < 0)
        return false;
    *number = (uint64_t)small;
    return *number <= limit;
}

static void copy_field(char *to, const char *field, size_t size) {
    size_t length = strnlen(field, size);
    memcpy(to, field, length);
    to[length] = '\0';
}

static void header_name(const struct tar_header *header, char name[PATH_MAX]) {
    size_t prefix = 0;
    if (memcmp(header->magic, "ustar", 6) == 0 && header->prefix[0]) {
        copy_field(name, header->prefix, sizeof header->prefix);
        prefix = strlen(name);
        name[prefix++] = '/';
    }
    copy_field(name + prefix, header->name, sizeof header->name);
}

/* Sparse format "old GNU": four extents in the header, the others in blocks of 21 after it. */
static int read_old_sparse(struct tar_reader *reader, const struct tar_header *header) {
    struct member *member = &reader->member;
    int64_t offset, length, size;
    char pieces[21][2][12];
    size_t count = 4;
    bool extended = header->gnu.extended;
    memcpy(pieces, header->gnu.extents, sizeof header->gnu.extents);
    if (!header_number(header->gnu.real_size, sizeof header->gnu.real_size, &size) || size < 0)
        return corrupt(reader, "bad size of a sparse file");
    member->size = (uint64_t)size;
    for (;;) {
        for (size_t i = 0; i < count && pieces[i][0][0]; i++)
            if (!header_number(pieces[i][0], 12, &offset) || !header_number(pieces[i][1], 12, &length) || offset < 0 ||
                length < 0 || !extents_add(&member->extents, (uint64_t)offset, (uint64_t)length))
                return corrupt(reader, "bad sparse map");
        if (!extended)
            return 0;
        int code = need(reader, TAR_BLOCK);
        if (code)
            return code;
        count = 21;
        memcpy(pieces, reader->data + reader->start, sizeof pieces);
        extended = reader->data[reader->start + sizeof pieces];
        reader->start += TAR_BLOCK;
    }
}

/* Sparse format 0.1: "offset,length,offset,length..." in one record. */
static bool parse_map(struct extents *extents, struct bytes text) {
    uint64_t numbers[2];
    size_t count = 0;
    extents->count = 0;
    for (;;) {
        const uint8_t *comma = text.length ? memchr(text.data, ',', text.length) : NULL;
        size_t length = comma ? (size_t)(comma - text.data) : text.length;
        if (!decimal_number((struct bytes){text.data, length}, &numbers[count++ % 2]))
            return false;
        if (count % 2 == 0 && !extents_add(extents, numbers[0], numbers[1]))
            return false;
        if (!comma)
            return count % 2 == 0;
        text = (struct bytes){comma + 1, text.length - length - 1};
    }
}

/* A number and newline of the map that precedes the data in sparse format 1.0. */
static int read_map_number(struct tar_reader *reader, uint64_t *number) {
    uint8_t digits[21];
    size_t count = 0;
    for (;; count++) {
        struct bytes data;
        if (reader->member.stored == 0 || count == sizeof digits)
            return corrupt(reader, "bad sparse map");
        int code = reader_data(reader, 1, &data);
        if (code)
            return code;
        digits[count] = data.data[0];
        reader_take(reader, 1);
        if (digits[count] == '\n')
            return decimal_number((struct bytes){digits, count}, number) ? 0 : corrupt(reader, "bad sparse map");
    }
}

static int read_map(struct tar_reader *reader) {
    struct member *member = &reader->member;
    uint64_t before = member->stored, count;
    int code = read_map_number(reader, &count);
    member->extents.count = 0;
    for (; !code && count > 0; count--) {
        uint64_t offset, length;
        code = read_map_number(reader, &offset);
        if (!code)
            code = read_map_number(reader, &length);
        if (!code && !extents_add(&member->extents, offset, length))
            code = corrupt(reader, "its sparse map is too long");
    }
    uint64_t padding = padding_of(before - member->stored);
    if (!code && padding > member->stored)
        code = corrupt(reader, "bad sparse map");
    if (code)
        return code;
    member->stored -= padding;
    return skip(reader, padding);
}

static int check_extents(struct tar_reader *reader) {
    const struct member *member = &reader->member;
    uint64_t end = 0, total = 0;
    for (size_t i = 0; i < member->extents.count; i++) {
        struct extent extent = member->extents.list[i];
        if (extent.offset < end || extent.offset > member->size || extent.length > member->size - extent.offset)
            return corrupt(reader, "its sparse map does not fit its size");
        end = extent.offset + extent.length;
        total += extent.length;
    }
    return total == member->stored ? 0 : corrupt(reader, "its sparse map does not fit its data");
}

static int parse_sparse(struct tar_reader *reader, const struct tar_header *header, struct bytes values[PAX_KEYS]) {
    struct member *member = &reader->member;
    int code = override_name(reader, values[PAX_SPARSE_NAME], member->name);
    struct bytes size = values[PAX_SPARSE_REALSIZE].length ? values[PAX_SPARSE_REALSIZE] : values[PAX_SPARSE_SIZE];
    if (!code && size.length && (!decimal_number(size, &member->size) || member->size > INT64_MAX))
        code = corrupt(reader, "bad size of a sparse file");
    if (code)
        return code;
    if (header->type == 'S')
        code = read_old_sparse(reader, header);
    else if (bytes_equal(values[PAX_SPARSE_MAJOR], "1") && bytes_equal(values[PAX_SPARSE_MINOR], "0"))
        code = read_map(reader);
    else if (values[PAX_SPARSE_MAJOR].length)
        code = corrupt(reader, "unknown version of sparse files");
    else if (values[PAX_SPARSE_MAP].length)
        code = parse_map(&member->extents, values[PAX_SPARSE_MAP]) ? 0 : corrupt(reader, "bad sparse map");
    else if (!size.length && !member->extents.count && !extents_add(&member->extents, 0, member->stored))
        code = fail(reader->failure, ENOMEM, "no memory for extracting %s", SHOW(member->name));
    return code ? code : check_extents(reader);
}

/* Fills the member from its header, the GNU long names and the pax records before it. */
static int parse_member(struct tar_reader *reader, const struct tar_header *header) {
    struct member *member = &reader->member;
    struct bytes values[PAX_KEYS] = {0};
    member->extents.count = 0;
    int code = parse_records(reader, &reader->global, values);
    member->extents.count = 0; /* a sparse map makes no sense for all members */
    if (!code)
        code = parse_records(reader, &reader->records, values);
    if (!code)
        code = override_name(reader, values[PAX_PATH], member->name);
    if (!code)
        code = override_name(reader, values[PAX_LINKPATH], member->link);
    if (code)
        return code;

    uint64_t uid, gid, mode, major, minor;
    int64_t seconds;
    if (!number_of(values[PAX_UID], header->uid, sizeof header->uid, UINT32_MAX - 1, &uid) ||
        !number_of(values[PAX_GID], header->gid, sizeof header->gid, UINT32_MAX - 1, &gid))
        return corrupt(reader, "bad owner");
    if (!number_of((struct bytes){0}, header->mode, sizeof header->mode, INT64_MAX, &mode))
        return corrupt(reader, "bad mode");
    if (!number_of(values[PAX_SIZE], header->size, sizeof header->size, INT64_MAX - TAR_BLOCK, &member->stored))
        return corrupt(reader, "bad size");
    if (values[PAX_MTIME].length) {
        if (!decimal_time(values[PAX_MTIME], &member->mtime))
            return corrupt(reader, "bad time");
    } else {
        if (!header_number(header->mtime, sizeof header->mtime, &seconds))
            return corrupt(reader, "bad time");
        member->mtime = (struct timespec){.tv_sec = seconds};
    }
    member->uid = (uid_t)uid;
    member->gid = (gid_t)gid;
    member->mode = mode & 07777;
    member->size = member->stored;

    char type = header->type;
    size_t length = strlen(member->name);
    if (type == 'D') /* GNU's directory with a list of its names as data */
        member->type = '5';
    else if (type == '\0' || type == '7' || type == 'S' || (type >= '8' && (type < 'A' || type > 'Z')))
        member->type = '0'; /* POSIX: types that are not known are files */
    else
        member->type = type;
    if (member->type == '0' && length > 0 && member->name[length - 1] == '/')
        member->type = '5'; /* as before POSIX */
    if (member->type < '0' || member->type > '6')
        return fail(reader->failure, ENOTSUP, "%s has the unsupported tar type %s", SHOW(member->name),
                    SHOW(((char[]){type, '\0'})));
    if (member->type == '3' || member->type == '4') {
        /* Linux: 12 bits of major, 20 of minor */
        if (!number_of((struct bytes){0}, header->major, sizeof header->major, 0xfff, &major) ||
            !number_of((struct bytes){0}, header->minor, sizeof header->minor, 0xfffff, &minor))
            return corrupt(reader, "bad device number");
        member->device = makedev((unsigned)major, (unsigned)minor);
    }
    if (type >= '1' && type <= '6') /* POSIX: their size, if any, counts no data */
        member->size = member->stored = 0;
    member->padding = padding_of(member->stored);
    return member->type == '0' ? parse_sparse(reader, header, values) : 0;
}

int reader_next(struct tar_reader *reader, bool *end) {
    struct member *member = &reader->member;
    bool long_name = false, long_link = false;
    int code = skip(reader, member->stored);
    if (!code)
        code = skip(reader, member->padding);
    member->stored = member->padding = 0;
    reader->records.length = 0;
    *end = false;
    while (!code) {
        struct tar_header header;
        uint64_t size = 0; /* of an extended header or a label */
        code = need(reader, TAR_BLOCK);
        if (code)
            return code;
        memcpy(&header, reader->data + reader->start, TAR_BLOCK);
        reader->start += TAR_BLOCK;
        *end = is_zero((const uint8_t *)&header, TAR_BLOCK);
        if (*end)
            return 0;
        if (!header_intact(&header))
            return corrupt(reader, "the checksum of the next header is wrong");
        bool extends = header.type && strchr("xgLKV", header.type);
        if (extends && !number_of((struct bytes){0}, header.size, sizeof header.size, INT64_MAX - TAR_BLOCK, &size))
            return corrupt(reader, "bad size of an extended header");
        switch (header.type) {
        case 'x':
            reader->records.length = 0;
            code = read_extended(reader, &reader->records, size, MAX_PAX_HEADER);
            break;
        case 'g':
            code = read_extended(reader, &reader->global, size, MAX_PAX_GLOBAL);
            break;
        case 'L':
            long_name = true;
            code = read_long_name(reader, size, member->name);
            break;
        case 'K':
            long_link = true;
            code = read_long_name(reader, size, member->link);
            break;
        case 'V': /* GNU: the archive's label */
            code = skip(reader, size + padding_of(size));
            break;
        default:
            if (!long_name)
                header_name(&header, member->name);
            if (!long_link)
                copy_field(member->link, header.link, sizeof header.link);
            return parse_member(reader, &header);
        }
    }
    return code;
}
