/* What the tests of the agent share: checks, directories and files. */
#ifndef BANGER_AGENT_TESTS_CHECK_H
#define BANGER_AGENT_TESTS_CHECK_H

#include <fcntl.h>
#include <ftw.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

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

/* Makes a directory in `scratch` and opens it. */
static inline int check_make_directory(const char *scratch, const char *name) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", scratch, name);
    CHECK(mkdir(path, 0755) == 0);
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

static inline void write_text(int directory, const char *name, const char *text) {
    int fd = openat(directory, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    close(fd);
}

static inline bool has_content(int directory, const char *name, const char *text) {
    char content[512];
    int fd = openat(directory, name, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd >= 0 ? read(fd, content, sizeof content) : -1;
    if (fd >= 0)
        close(fd);
    return length == (ssize_t)strlen(text) && memcmp(content, text, (size_t)length) == 0;
}

#endif
