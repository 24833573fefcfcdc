/* The log: output of commands as records on a port of its own. */
#ifndef BANGER_LOG_H
#define BANGER_LOG_H

#include "agent.h"

/* Records go to a descriptor (non-blocking, may be -1: none) ... */
void log_use_port(int fd);
/* ... or to a port of vsock, whenever somebody listens there, ... */
void log_use_vsock(unsigned cid, unsigned port);
/* ... or to a file, or to a fifo whenever somebody reads it. */
void log_use_path(const char *path);
/* False while a reader is there but has not taken what is queued. */
bool log_room(void);
/* Queues a record of at most MAX_PAYLOAD bytes; drops it when nobody reads. */
void log_record(uint8_t stream, const uint8_t *data, size_t length);
void log_pump(void);
/* True while records wait for their reader. */
bool log_pending(void);

#endif
