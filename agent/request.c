/* Collects the parts of one request; memory grows with what has come, never by a length that the host only claims. */
#include "request.h"

static struct buffer parts;
static uint32_t collected_for; /* the channel of the parts; 0: there are none */

bool request_part(uint32_t channel, struct bytes payload) {
    if ((collected_for != 0 && collected_for != channel) || payload.length > MAX_REQUEST - parts.length)
        return false;
    collected_for = channel;
    buffer_append(&parts, payload.data, payload.length);
    return true;
}

bool request_whole(uint32_t channel, struct bytes last, struct bytes *whole, bool *failed) {
    *whole = last;
    *failed = false;
    if (collected_for == 0)
        return true;
    if (!request_part(channel, last))
        return false;
    *whole = (struct bytes){parts.data, parts.length};
    *failed = parts.failed;
    return true;
}

void request_forget(void) {
    buffer_free(&parts);
    collected_for = 0;
}
