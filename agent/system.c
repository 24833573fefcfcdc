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

ssize_t read_start(const char *path, char *text, size_t size) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd >= 0 ? read(fd, text, size - 1) : -1;
    if (fd >= 0)
        close(fd);
    text[length > 0 ? length : 0] = 0;
    return length;
}

bool read_line(const char *path, char *line, size_t size) {
    if (read_start(path, line, size) < 0)
        return false;
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
