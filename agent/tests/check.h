/* What the tests of the agent share: checks, and a directory of their own. */
#ifndef BANGER_AGENT_TESTS_CHECK_H
#define BANGER_AGENT_TESTS_CHECK_H

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static inline int check_remove_entry(const char *path, const struct stat *status, int type, struct FTW *walk) {
    (void)status, (void)type, (void)walk;
    return remove(path);
}

/* Removes a directory and all in it. */
static inline void check_remove_tree(const char *path) {
    nftw(path, check_remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

#endif
