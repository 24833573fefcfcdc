/* Opening directories below another one that no name and no symbolic link can leave. */
#ifndef BANGER_BENEATH_H
#define BANGER_BENEATH_H

#include <limits.h>

#include "agent.h"

/* Copies `name` without leading slashes, empty and "." components; false when it has "..", or does not fit. */
bool normalise_name(const char *name, char path[]);

/* Makes one directory, for the owner that `options` give to everything, if they do and this process is root. */
int make_directory(int parent, const char *name, mode_t mode, const struct tree_options *options);

/* Opens the directory `path` (normalised) below `root`, as an O_PATH descriptor; with `maker` missing ones are made.
 * -1 with errno; EXDEV when a symbolic link leads out of root. */
int open_beneath(int root, const char *path, const struct tree_options *maker);

/* Opens the directory `path` as a process would whose root directory `root` is, as an O_PATH descriptor: links and ".."
 * end there. With `make` missing directories are made, also those that a link leads to. -1 with errno. All paths of an
 * image go through this function. */
int open_in_root(int root, const char *path, bool make);

/* Follows the links of the last component of an absolute `path`, too: opens the directory (made when it is missing) of
 * the file that they lead to, whose name becomes `leaf`, there or not. -1 with errno. */
int open_parent_in_root(int root, const char *path, char leaf[NAME_MAX + 1]);

#endif
