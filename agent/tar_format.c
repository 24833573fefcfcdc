/* Numbers, checksums and records of the tar formats. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tar.h"

/* Length of the valid UTF-8 sequence of a printable character at `text`, or 0 (RFC 3629). */
static size_t printable(const unsigned char *text) {
    if (text[0] < 0x80)
        return text[0] >= 0x20 && text[0] != 0x7f && text[0] != '\\';
    size_t length = text[0] >= 0xf0 ? 4 : text[0] >= 0xe0 ? 3 : 2;
    if (text[0] < 0xc2 || text[0] > 0xf4)
        return 0;
    uint32_t code = text[0] & (0xff >> (length + 1));
    for (size_t i = 1; i < length; i++) {
        if ((text[i] & 0xc0) != 0x80)
            return 0;
        code = code << 6 | (text[i] & 0x3f);
    }
    bool overlong = code < (length == 4 ? 0x10000u : length == 3 ? 0x800u : 0xa0u);
    return overlong || (code >= 0xd800 && code < 0xe000) || code > 0x10ffff ? 0 : length;
}

const char *show_name(const char *name, char shown[SHOWN_SIZE]) {
    size_t used = 0;
    while (*name && used < SHOWN_SIZE - 8) {
        size_t length = printable((const unsigned char *)name);
        if (length) {
            memcpy(shown + used, name, length);
            used += length;
        } else {
            length = 1;
            used += (size_t)sprintf(shown + used, "\\%03o", *(const unsigned char *)name);
        }
        name += length;
    }
    strcpy(shown + used, *name ? "..." : "");
    return shown;
}

bool header_number(const char *field, size_t size, int64_t *number) {
    const unsigned char *byte = (const unsigned char *)field, *end = byte + size;
    if (*byte == 0x80 || *byte == 0xff) { /* base-256, two's complement */
        uint64_t value = *byte == 0xff ? UINT64_MAX : 0;
        uint64_t sign = value;
        while (++byte < end) {
            if (value >> 55 != sign >> 55) /* the next byte would push out more than the sign */
                return false;
            value = value << 8 | *byte;
        }
        *number = (int64_t)value;
        return true;
    }
    while (byte < end && *byte == ' ')
        byte++;
    uint64_t value = 0;
    for (; byte < end && *byte >= '0' && *byte <= '7'; byte++)
        value = value << 3 | (uint64_t)(*byte - '0'); /* at most 12 digits */
    *number = (int64_t)value;
    return byte == end || *byte == ' ' || *byte == '\0';
}

unsigned header_checksum(const struct tar_header *header) {
    const unsigned char *bytes = (const unsigned char *)header;
    unsigned sum = ' ' * sizeof header->checksum;
    for (size_t i = 0; i < TAR_BLOCK; i++)
        sum += bytes[i];
    for (size_t i = 0; i < sizeof header->checksum; i++)
        sum -= (unsigned char)header->checksum[i];
    return sum;
}

bool header_intact(const struct tar_header *header) {
    int64_t stored;
    if (!header_number(header->checksum, sizeof header->checksum, &stored))
        return false;
    int64_t sum = header_checksum(header);
    int64_t high = 0; /* old systems summed signed characters */
    for (size_t i = 0; i < TAR_BLOCK; i++)
        high += ((const unsigned char *)header)[i] >> 7;
    for (size_t i = 0; i < sizeof header->checksum; i++)
        high -= (unsigned char)header->checksum[i] >> 7;
    return stored == sum || stored == sum - high * 256;
}

bool is_zero(const uint8_t *data, size_t length) {
    return length == 0 || (data[0] == 0 && memcmp(data, data + 1, length - 1) == 0);
}

bool decimal_number(struct bytes text, uint64_t *number) {
    *number = 0;
    for (size_t i = 0; i < text.length; i++) {
        if (text.data[i] < '0' || text.data[i] > '9')
            return false;
        if (__builtin_mul_overflow(*number, 10, number) || __builtin_add_overflow(*number, text.data[i] - '0', number))
            return false;
    }
    return text.length > 0;
}

bool decimal_time(struct bytes text, struct timespec *time) {
    bool negative = text.length > 0 && text.data[0] == '-';
    if (negative)
        text = (struct bytes){text.data + 1, text.length - 1};
    const uint8_t *point = text.length ? memchr(text.data, '.', text.length) : NULL;
    struct bytes whole = {text.data, point ? (size_t)(point - text.data) : text.length};
    uint64_t seconds;
    if (!decimal_number(whole, &seconds) || seconds >= INT64_MAX)
        return false;
    long nanoseconds = 0;
    long unit = 100000000;
    for (size_t i = whole.length + 1; i < text.length; i++, unit /= 10) {
        if (text.data[i] < '0' || text.data[i] > '9')
            return false;
        nanoseconds += unit * (text.data[i] - '0');
    }
    time->tv_sec = negative ? -(time_t)seconds - (nanoseconds > 0) : (time_t)seconds;
    time->tv_nsec = negative && nanoseconds ? 1000000000 - nanoseconds : nanoseconds;
    return true;
}

bool bytes_equal(struct bytes bytes, const char *text) {
    return bytes.length == strlen(text) && memcmp(bytes.data, text, bytes.length) == 0;
}

bool pax_next(struct bytes *rest, struct bytes *key, struct bytes *value, bool *bad) {
    if (rest->length == 0)
        return false;
    *bad = true;
    const uint8_t *space = memchr(rest->data, ' ', rest->length);
    uint64_t length;
    if (!space || !decimal_number((struct bytes){rest->data, (size_t)(space - rest->data)}, &length))
        return false;
    size_t before = (size_t)(space - rest->data) + 1;
    if (length <= before || length > rest->length || rest->data[length - 1] != '\n')
        return false;
    const uint8_t *equals = memchr(space + 1, '=', length - before);
    if (!equals)
        return false;
    *key = (struct bytes){space + 1, (size_t)(equals - space) - 1};
    *value = (struct bytes){equals + 1, (size_t)(rest->data + length - 1 - (equals + 1))};
    *rest = (struct bytes){rest->data + length, rest->length - length};
    *bad = false;
    return true;
}

void pax_append(struct buffer *records, const char *key, const void *value, size_t length) {
    size_t body = strlen(key) + length + 3; /* space, '=' and newline */
    char digits[24];
    size_t total = body;
    /* The length counts its own digits. */
    while (total != body + (size_t)snprintf(digits, sizeof digits, "%zu", total))
        total = body + strlen(digits);
    buffer_append(records, digits, strlen(digits));
    buffer_append(records, " ", 1);
    buffer_append(records, key, strlen(key));
    buffer_append(records, "=", 1);
    buffer_append(records, value, length);
    buffer_append(records, "\n", 1);
}

void xattr_to_key(const char *name, char out[XATTR_KEY_SIZE]) {
    out += sprintf(out, XATTR_KEY);
    for (; *name; name++)
        out += *name == '=' || *name == '%' ? sprintf(out, "%%%02X", *name) : sprintf(out, "%c", *name);
}

bool xattr_from_key(struct bytes key, char out[XATTR_KEY_SIZE]) {
    size_t prefix = strlen(XATTR_KEY);
    if (key.length <= prefix || key.length >= XATTR_KEY_SIZE || memcmp(key.data, XATTR_KEY, prefix) != 0)
        return false;
    for (size_t i = prefix; i < key.length; i++) {
        const char *code = (const char *)key.data + i;
        bool escaped = key.length - i >= 3 && (memcmp(code, "%3D", 3) == 0 || memcmp(code, "%25", 3) == 0);
        *out++ = escaped ? (code[1] == '3' ? '=' : '%') : *code;
        i += escaped ? 2 : 0;
    }
    *out = '\0';
    return true;
}

bool extents_add(struct extents *extents, uint64_t offset, uint64_t length) {
    if (extents->count == MAX_EXTENTS)
        return false;
    if (extents->count == extents->capacity) {
        size_t capacity = extents->capacity ? extents->capacity * 2 : 16;
        struct extent *list = realloc(extents->list, capacity * sizeof *list);
        if (!list)
            return false;
        *extents = (struct extents){list, extents->count, capacity};
    }
    extents->list[extents->count++] = (struct extent){offset, length};
    return true;
}
