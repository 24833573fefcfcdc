/* Fuzzes what reads the lines of files in /proc, parts of which the guest's processes make up. */
#include <stdlib.h>
#include <string.h>

#include "../system.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(bool good) {
    if (!good)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char *line = malloc(size + 1), name[64];
    struct process process;
    struct process_details details;
    struct listener listener;
    struct mount mount;
    uint64_t first, second;
    check(line != NULL);
    memcpy(line, data, size);
    line[size] = 0;
    if (parse_process_details(line, &details))
        check(parse_process(line, &process) && strlen(details.name) < sizeof details.name);
    parse_cpu(line, &first, &second);
    parse_memory(line, "MemTotal:", &first);
    if (parse_disk(line, name, &first, &second) || parse_net(line, name, &first, &second))
        check(strlen(name) < sizeof name);
    if (parse_mount(line, &mount))
        check(strlen(mount.target) < sizeof mount.target);
    if (parse_listener(line, false, &listener) || parse_listener(line, true, &listener))
        check(strlen(listener.address) < sizeof listener.address);
    join_words(line, size);
    check(strlen(line) <= size);
    free(line);
    return 0;
}
