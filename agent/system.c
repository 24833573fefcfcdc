/* What everybody needs of the kernel: the clock, and files of one line. */
#include <fcntl.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "system.h"

int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

bool read_line(const char *path, char *line, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t length = read(fd, line, size - 1);
    close(fd);
    if (length < 0)
        return false;
    line[length] = 0;
    line[strcspn(line, "\n")] = 0;
    return true;
}

void write_setting(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    ssize_t written = write(fd, text, strlen(text));
    (void)written;
    close(fd);
}
