/* Fields (u16 tag, u32 length, value) of requests and replies, and the failures of requests. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent.h"
#include "wire.h"

enum { FIELD_HEADER = 6 };

bool fields_next(struct fields *fields, uint16_t *tag, struct bytes *value) {
    struct bytes *rest = &fields->rest;
    if (fields->bad || rest->length == 0)
        return false;
    if (rest->length < FIELD_HEADER || get_u32(rest->data + 2) > rest->length - FIELD_HEADER) {
        fields->bad = true;
        return false;
    }
    *tag = get_u16(rest->data);
    *value = (struct bytes){rest->data + FIELD_HEADER, get_u32(rest->data + 2)};
    rest->data += FIELD_HEADER + value->length;
    rest->length -= FIELD_HEADER + value->length;
    return true;
}

bool value_number(struct bytes value, uint64_t *number) {
    if (value.length != sizeof *number)
        return false;
    *number = get_u64(value.data);
    return true;
}

char *value_string(struct bytes value, size_t limit) {
    if (value.length > limit || (value.length > 0 && memchr(value.data, 0, value.length) != NULL))
        return NULL;
    char *text = malloc(value.length + 1);
    if (text == NULL)
        return NULL;
    if (value.length > 0)
        memcpy(text, value.data, value.length);
    text[value.length] = 0;
    return text;
}

static bool buffer_reserve(struct buffer *buffer, size_t length) {
    if (buffer->failed || length > SIZE_MAX / 2 - buffer->length) {
        buffer->failed = true;
        return false;
    }
    size_t needed = buffer->length + length, capacity = buffer->capacity ? buffer->capacity : 256;
    if (needed <= buffer->capacity)
        return true;
    while (capacity < needed)
        capacity *= 2;
    uint8_t *data = realloc(buffer->data, capacity);
    if (data == NULL) {
        buffer->failed = true;
        return false;
    }
    buffer->data = data;
    buffer->capacity = capacity;
    return true;
}

void buffer_append(struct buffer *buffer, const void *data, size_t length) {
    if (length == 0 || !buffer_reserve(buffer, length))
        return;
    memcpy(buffer->data + buffer->length, data, length);
    buffer->length += length;
}

void buffer_free(struct buffer *buffer) {
    free(buffer->data);
    *buffer = (struct buffer){0};
}

void put_bytes(struct buffer *buffer, uint16_t tag, const void *data, size_t length) {
    uint8_t header[FIELD_HEADER];
    if (length > UINT32_MAX || !buffer_reserve(buffer, sizeof header + length)) {
        buffer->failed = true;
        return;
    }
    put_u16(header, tag);
    put_u32(header + 2, (uint32_t)length);
    buffer_append(buffer, header, sizeof header);
    buffer_append(buffer, data, length);
}

void put_string(struct buffer *buffer, uint16_t tag, const char *text) { put_bytes(buffer, tag, text, strlen(text)); }

void put_number(struct buffer *buffer, uint16_t tag, uint64_t number) {
    uint8_t value[sizeof number];
    put_u64(value, number);
    put_bytes(buffer, tag, value, sizeof value);
}

void put_nested(struct buffer *buffer, uint16_t tag, struct buffer *nested) {
    buffer->failed = buffer->failed || nested->failed;
    put_bytes(buffer, tag, nested->data, nested->length);
    buffer_free(nested);
}

int fail(struct failure *failure, int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    failure->code = code;
    vsnprintf(failure->message, sizeof failure->message, format, arguments);
    va_end(arguments);
    return code;
}
