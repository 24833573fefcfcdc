/* vsock(7), the way to the host where there is no virtio-serial port: Firecracker. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "system.h"

enum { BACKLOG = 16, CONNECT_MS = 200 };

bool vsock_present(void) {
    DIR *devices = opendir("/sys/bus/virtio/devices");
    if (!devices)
        return false;
    bool found = false;
    struct dirent *entry;
    while (!found && (entry = readdir(devices))) {
        char path[300], type[16];
        snprintf(path, sizeof path, "/sys/bus/virtio/devices/%s/device", entry->d_name);
        /* device 19 is the socket device (Virtual I/O Device, section 5.10) */
        found = read_line(path, type, sizeof type) && strcmp(type, "0x0013") == 0;
    }
    closedir(devices);
    return found;
}

int vsock_listen(unsigned port) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, BACKLOG) == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

int vsock_connect(unsigned cid, unsigned port) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
    struct timeval limit = {.tv_usec = CONNECT_MS * 1000};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &limit, sizeof limit);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0 && fcntl(fd, F_SETFL, O_NONBLOCK) == 0)
        return fd;
    close(fd);
    return -1;
}

bool vsock_from_host(int fd) {
    struct sockaddr_vm address;
    socklen_t length = sizeof address;
    if (getpeername(fd, (struct sockaddr *)&address, &length) != 0)
        return false;
    return address.svm_family != AF_VSOCK || address.svm_cid == VMADDR_CID_HOST;
}
