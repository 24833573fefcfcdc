/* Requests that are longer than a frame: their parts wait here for the OPEN that ends them. */
#ifndef BANGER_REQUEST_H
#define BANGER_REQUEST_H

#include "agent.h"

/* Keeps the payload of PART; false when it breaks the protocol: parts of two requests, or more than MAX_REQUEST. */
bool request_part(uint32_t channel, struct bytes payload);
/* The whole payload of an OPEN whose own is `last`. False when parts of another channel's request are kept. With
 * `failed` set there was no memory for it. It lies where request_forget frees it. */
bool request_whole(uint32_t channel, struct bytes last, struct bytes *whole, bool *failed);
void request_forget(void);

#endif
