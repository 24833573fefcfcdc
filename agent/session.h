/* The connection to the host: handshake, frames in, a bounded queue of frames out. */
#ifndef BANGER_SESSION_H
#define BANGER_SESSION_H

#include <sys/uio.h>

#include "frame.h"

/* Speaks on a port that is always there (virtio-serial), ... */
bool session_use_port(int fd);
/* ... or with one connection at a time of a listening socket, `host_only` when others might connect to it. */
bool session_use_listener(int fd, bool host_only);

/* One round of reading and handling frames, and one of writing; true when there may be more to do at once. */
bool session_input(void);
bool session_output(void);
/* How long the loop may sleep; -1: no limit. */
int session_timeout_ms(void);
/* True while frames wait to be written. */
bool session_pending(void);

/* Room for any frame but DATA, and for another DATA frame: bulk may fill half of the queue, so that all else gets
 * through. */
bool session_room(void);
bool session_bulk_room(void);
/* The caller has made sure of the room (handlers of frames may rely on it for one frame each). */
void session_send(uint8_t type, uint8_t stream, uint32_t channel, const void *payload, size_t length);
void session_send_error(uint32_t channel, const struct failure *failure);
/* DATA without a copy: first where the payload goes (at most MAX_PAYLOAD), then how much of it there is. */
void session_data_space(size_t length, struct iovec parts[2]);
void session_data_send(uint8_t stream, uint32_t channel, size_t length);

/* The host has broken the protocol: ends the session once the frame is dealt with. */
void session_violation(void);

#endif
