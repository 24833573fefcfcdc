/* Opening directories below another one that no name and no symbolic link can leave. */
#ifndef BANGER_BENEATH_H
#define BANGER_BENEATH_H

#include "agent.h"

/* Copies `name` without leading slashes, empty and "." components; false when it has "..", or does not fit. */
bool normalise_name(const char *name, char path[]);

/* Makes one directory, for the owner that `options` give to everything, if they do and this process is root. */
int make_directory(int parent, const char *name, mode_t mode, const struct tree_options *options);

/* Opens the directory `path` (normalised) below `root`, as an O_PATH descriptor; with `maker` missing ones are made.
 * -1 with errno; EXDEV when a symbolic link leads out of root. */
int open_beneath(int root, const char *path, const struct tree_options *maker);

#endif
