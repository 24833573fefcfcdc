/* A queue of bytes in one piece of memory. */
#include "ring.h"

#include <stdlib.h>
#include <string.h>

enum { RING_MINIMUM = 16 * 1024 };

void ring_parts(const struct ring *ring, size_t offset, size_t length, struct iovec parts[2]) {
    size_t begin = ring->start + offset;
    if (begin >= ring->capacity)
        begin -= ring->capacity;
    size_t first = ring->capacity - begin < length ? ring->capacity - begin : length;
    parts[0] = (struct iovec){ring->data + begin, first};
    parts[1] = (struct iovec){ring->data, length - first};
}

void ring_put(struct ring *ring, size_t offset, const void *data, size_t length) {
    struct iovec parts[2];
    if (length == 0)
        return;
    ring_parts(ring, offset, length, parts);
    memcpy(parts[0].iov_base, data, parts[0].iov_len);
    memcpy(parts[1].iov_base, (const uint8_t *)data + parts[0].iov_len, parts[1].iov_len);
}

static bool ring_grow(struct ring *ring, size_t needed, size_t limit) {
    size_t capacity = ring->capacity ? ring->capacity : RING_MINIMUM;
    while (capacity < needed)
        capacity *= 2;
    if (needed > limit)
        return false;
    uint8_t *data = malloc(capacity);
    if (data == NULL)
        return false;
    if (ring->length > 0) {
        struct iovec parts[2];
        ring_parts(ring, 0, ring->length, parts);
        memcpy(data, parts[0].iov_base, parts[0].iov_len);
        memcpy(data + parts[0].iov_len, parts[1].iov_base, parts[1].iov_len);
    }
    free(ring->data);
    *ring = (struct ring){data, capacity, 0, ring->length};
    return true;
}

bool ring_append(struct ring *ring, const void *data, size_t length, size_t limit) {
    size_t needed = ring->length + length;
    if (needed > ring->capacity && !ring_grow(ring, needed, limit))
        return false;
    ring_put(ring, ring->length, data, length);
    ring->length = needed;
    return true;
}

void ring_consume(struct ring *ring, size_t length) {
    ring->length -= length;
    ring->start += length;
    if (ring->start >= ring->capacity)
        ring->start -= ring->capacity;
    if (ring->length == 0)
        ring->start = 0; /* short traffic then stays in the same few pages */
}
