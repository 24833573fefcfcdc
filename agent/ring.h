/* A queue of bytes in one piece of memory, filled and emptied without moving what is in it. */
#ifndef BANGER_RING_H
#define BANGER_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct ring {
    uint8_t *data;
    size_t capacity, start, length;
};

/* The two parts (the second often empty) of `length` bytes that begin `offset` bytes behind the oldest. */
void ring_parts(const struct ring *ring, size_t offset, size_t length, struct iovec parts[2]);
/* Copies into the ring `offset` bytes behind the oldest; the caller knows that there is room. */
void ring_put(struct ring *ring, size_t offset, const void *data, size_t length);
/* Appends; grows by doubling up to `limit`. False when that is not enough, or memory is short. */
bool ring_append(struct ring *ring, const void *data, size_t length, size_t limit);
void ring_consume(struct ring *ring, size_t length);

#endif
