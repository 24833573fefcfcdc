/* Frames of the guest protocol: parsing a byte stream into them, and their headers. No input or output here. */
#ifndef BANGER_FRAME_H
#define BANGER_FRAME_H

#include "agent.h"

struct frame {
    uint8_t type, stream;
    uint32_t channel;
    struct bytes payload;
};

uint32_t crc32(const uint8_t *data, size_t length);

/* Writes the header of a frame and returns its check, which the trailer repeats. */
uint32_t frame_header(uint8_t header[HEADER_SIZE], uint8_t type, uint8_t stream, uint32_t channel, uint32_t length);

/* Bytes are read straight into `data`, and payloads are used where they lie. */
struct parser {
    uint8_t data[4 * MAX_FRAME];
    size_t start, end;
    bool synced; /* false: all is discarded until a HELLO */
};

/* Where at least MAX_FRAME more bytes can be put, once parser_next has returned PARSED_NOTHING. */
struct bytes parser_space(struct parser *parser);
void parser_filled(struct parser *parser, size_t length);

enum parsed {
    PARSED_NOTHING, /* more bytes are needed */
    PARSED_FRAME,   /* its payload stays where it is until parser_space */
    PARSED_BROKEN,  /* the session is over; the next frame will be a HELLO */
};
enum parsed parser_next(struct parser *parser, struct frame *frame);

#endif
