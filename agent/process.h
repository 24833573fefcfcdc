/* Children of the agent: how they are made, signalled, reaped; and the main command. */
#ifndef BANGER_PROCESS_H
#define BANGER_PROCESS_H

#include "channel.h"

/* The ends of the pipes (or the terminal) of a child that is being made; -1: none. */
struct plumbing {
    int child[3];  /* standard input, output and error of the child */
    int input;     /* the agent's ends */
    int output[2];
};

extern const struct plumbing plumbing_empty;
/* A pipe as large as the kernel allows; the agent's end of it does not block. */
int plumbing_pipe(int *read_end, int *write_end, bool agent_reads, struct failure *failure);
void plumbing_close(struct plumbing *plumbing);

/* What a child does: fills `failure` and returns, or ends the process itself. */
typedef void child_main(const void *context, struct failure *failure);

/* Forks: the child runs `run` in a session of its own with just its three descriptors. The channel gets the agent's
 * ends, the pid and the report. The plumbing is used up in any case. With EXEC_INIT in the channel's flags the child is
 * PID 1 of a namespace, in which all others run while it lives. 0, or the errno in `failure`. */
int process_spawn(struct channel *channel, struct plumbing *plumbing, child_main *run, const void *context,
                  struct failure *failure);
/* What the child reported: 1 a failure, 0 nothing and it cannot any more, -1 not known yet. */
int process_report(struct watch *report, struct failure *failure);
void process_reap(void);
void process_hangup(pid_t pid);
/* A signal from the host: to the foreground group of a terminal, else to the command's own group. */
void process_signal(struct channel *channel, uint32_t number);

/* The main command: false when there is one that still runs. */
bool process_main_reserve(void);
void process_main_spawned(pid_t pid);
/* No-ops for any other process. */
void process_main_started(pid_t pid);
void process_main_failed(pid_t pid);
/* The pid of the main command while it runs, else 0. */
pid_t process_main_pid(void);
bool process_main_ended(uint32_t *kind, uint32_t *value);

#endif
