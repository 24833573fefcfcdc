/* Parses a byte stream into frames, and finds the way back after damage: docs/guest-protocol.md, "Sessions". */
#include "frame.h"

#include <string.h>

#include "wire.h"

uint32_t frame_header(uint8_t header[HEADER_SIZE], uint8_t type, uint8_t stream, uint32_t channel, uint32_t length) {
    header[0] = 'B';
    header[1] = 'G';
    header[2] = type;
    header[3] = stream;
    put_u32(header + 4, channel);
    put_u32(header + 8, length);
    uint32_t check = crc32(header, 12) | 1;
    put_u32(header + 12, check);
    return check;
}

struct bytes parser_space(struct parser *parser) {
    size_t pending = parser->end - parser->start;
    if (pending == 0 || sizeof parser->data - parser->end < MAX_FRAME) {
        memmove(parser->data, parser->data + parser->start, pending);
        parser->start = 0;
        parser->end = pending;
    }
    return (struct bytes){parser->data + parser->end, sizeof parser->data - parser->end};
}

void parser_filled(struct parser *parser, size_t length) { parser->end += length; }

/* True when a whole frame with a good trailer begins at `data`; the header was checked before. */
static bool read_frame(const uint8_t *data, struct frame *frame) {
    uint32_t length = get_u32(data + 8);
    if (memcmp(data + 12, data + HEADER_SIZE + length, TRAILER_SIZE) != 0)
        return false;
    *frame = (struct frame){data[2], data[3], get_u32(data + 4), {data + HEADER_SIZE, length}};
    return true;
}

static enum parsed find_hello(struct parser *parser, struct frame *frame) {
    uint8_t header[HEADER_SIZE];
    frame_header(header, FRAME_HELLO, 0, 0, HELLO_SIZE);
    for (;;) {
        size_t pending = parser->end - parser->start;
        const uint8_t *found = memmem(parser->data + parser->start, pending, header, sizeof header);
        if (found == NULL) {
            if (pending >= sizeof header)
                parser->start = parser->end - (sizeof header - 1);
            return PARSED_NOTHING;
        }
        parser->start = (size_t)(found - parser->data);
        if (parser->end - parser->start < HEADER_SIZE + HELLO_SIZE + TRAILER_SIZE)
            return PARSED_NOTHING;
        if (read_frame(found, frame)) {
            parser->start += HEADER_SIZE + HELLO_SIZE + TRAILER_SIZE;
            parser->synced = true;
            return PARSED_FRAME;
        }
        parser->start++;
    }
}

static bool header_good(const uint8_t *data) {
    return data[2] >= FRAME_HELLO && data[2] <= FRAME_PART && get_u32(data + 8) <= MAX_PAYLOAD &&
           get_u32(data + 12) == (crc32(data, 12) | 1);
}

/* The search goes on right behind the first byte of the broken frame: a HELLO may stand in what was taken for payload. */
static enum parsed broken(struct parser *parser) {
    parser->start++;
    parser->synced = false;
    return PARSED_BROKEN;
}

enum parsed parser_next(struct parser *parser, struct frame *frame) {
    if (!parser->synced)
        return find_hello(parser, frame);
    while (parser->start < parser->end && parser->data[parser->start] == 0)
        parser->start++;
    const uint8_t *data = parser->data + parser->start;
    size_t pending = parser->end - parser->start;
    if (memcmp(data, "BG", pending < 2 ? pending : 2) != 0)
        return broken(parser);
    if (pending < HEADER_SIZE)
        return PARSED_NOTHING;
    if (!header_good(data))
        return broken(parser);
    size_t size = HEADER_SIZE + get_u32(data + 8) + TRAILER_SIZE;
    if (pending < size)
        return PARSED_NOTHING;
    if (!read_frame(data, frame))
        return broken(parser);
    parser->start += size;
    return PARSED_FRAME;
}
