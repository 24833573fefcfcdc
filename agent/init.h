/* Who is to be PID 1: judged by the main command, once the image is there to look into. */
#ifndef BANGER_INIT_H
#define BANGER_INIT_H

#include <limits.h>

#include "agent.h"

/* What words that a main command is made of run: INIT_IMAGE (the init of a system), INIT_COMMAND (an init of containers,
 * or whatever is called /init), INIT_AGENT (any other). Links are followed, and shells read for what they exec last.
 * `directory` is where it starts, `path` its PATH. */
uint64_t init_judge(char **words, const char *directory, const char *path);
/* True for those inits of containers that do as well when they are not PID 1. */
bool init_is_modest(const char *word);
/* The file that `name` is executed from, found as by execvp(3) started in `directory`. */
bool program_find(const char *name, const char *directory, const char *path, char found[PATH_MAX]);

#endif
