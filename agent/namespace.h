/* The PID namespace in which a main command is PID 1, and how others join it. */
#ifndef BANGER_NAMESPACE_H
#define BANGER_NAMESPACE_H

#include "agent.h"

/* True while there is one whose PID 1 lives. */
bool namespace_there(void);
/* As fork(2). With `inside` the child is PID 1 of a PID namespace, in a mount namespace of its own; else it joins the one
 * that is there, if any. -1 with `failure`. */
pid_t namespace_fork(bool inside, struct failure *failure);
/* In the child, first: takes up the mounts that belong to its PID namespace. 0, or the errno in `failure`. */
int namespace_enter(struct failure *failure);
/* As open(2), seen as by the commands that join the namespace. */
int namespace_open(const char *path, int flags);
/* A child has been reaped: true when it was PID 1 of the namespace, which is gone with it. */
bool namespace_ended(pid_t pid);

#endif
