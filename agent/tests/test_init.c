/* Unit tests of who is to be PID 1, in a directory that becomes the root of a child process. */
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../init.h"
#include "check.h"

static const char *const programs[] = {
    "usr/lib/systemd/systemd", "usr/bin/busybox", "usr/bin/nginx",     "usr/bin/bash",   "usr/bin/tini", "usr/bin/env",
    "usr/bin/s6-svscan",       "usr/sbin/runit-init", "usr/bin/gosu",  "usr/bin/python", "opt/init",     "usr/bin/my_init",
};

static const struct {
    const char *path, *target;
} links[] = {
    {"bin", "usr/bin"},
    {"sbin", "usr/sbin"},
    {"lib", "usr/lib"},
    {"usr/bin/sh", "bash"},
    {"usr/bin/ash", "/bin/busybox"},
    {"usr/sbin/init", "../lib/systemd/systemd"},
    {"usr/bin/systemd", "/lib/systemd/systemd"},
    {"usr/local/sbin/init", "/usr/bin/tini"},
    {"usr/bin/init", "busybox"},
    {"usr/bin/loop", "loop"},
    {"usr/bin/dangling", "/no/such"},
};

static const struct {
    const char *path, *text;
} scripts[] = {
    {"init", "#!/bin/sh -e\n# exec /sbin/init\nexec s6-overlay-suexec /run \"$@\"\n"},
    {"entry.sh", "#!/bin/sh\nset -e\ndo_this\nexec \"$@\"\n"},
    {"systemd.sh", "#!/usr/bin/env bash\nprepare && mount; exec </dev/null\nexec -a init /lib/systemd/systemd --unit=x 2>&1\n"},
    {"choose.sh", "#!/bin/bash\nif [ $# -eq 0 ]; then\n  exec /sbin/init\nfi\nexec \"$@\" # exec /sbin/init\n"},
    {"env.sh", "#!/bin/sh\nexec env -i container=x 'systemd'\n"},
    {"tini.sh", "#!/bin/sh\nexec tini -- nginx\n"},
    {"gosu.sh", "#!/bin/sh\nexec gosu app \"$0\" \"$@\"\n"},
    {"quoted.sh", "#!/bin/sh\necho \"exec /sbin/init; exec /sbin/init\"\nexec >/log 2>&1\nexec nginx\n"},
    {"again.sh", "#!/bin/sh\nexec /again.sh\n"},
    {"python.sh", "#!/usr/bin/python\nexec /sbin/init\n"},
    {"large.sh", "#!/bin/sh\nexec "},
    {"srv/here", "#!/bin/ash\nexec ../sbin/init\n"},
};

static void make_directories(const char *path) {
    char parent[256];
    for (const char *slash = strchr(path, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        snprintf(parent, sizeof parent, "%.*s", (int)(slash - path), path);
        mkdir(parent, 0755);
    }
}

static void write_program(const char *path, const char *text) {
    make_directories(path);
    FILE *file = fopen(path, "w");
    CHECK(file != NULL && fputs(text, file) >= 0 && fclose(file) == 0 && chmod(path, 0755) == 0);
}

static uint64_t judge(const char *directory, const char *first, const char *second, const char *third) {
    char *words[] = {(char *)first, (char *)second, (char *)third, NULL};
    return init_judge(words, directory, USUAL_PATH);
}

#define IS(mode, ...) CHECK(judge("/", __VA_ARGS__) == (mode))

static void check_all(void) {
    char long_text[200000];
    memset(long_text, 'x', sizeof long_text);
    long_text[sizeof long_text - 1] = 0;
    for (size_t i = 0; i < sizeof programs / sizeof *programs; i++)
        write_program(programs[i], "\177ELF");
    for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
        make_directories(links[i].path);
        CHECK(symlink(links[i].target, links[i].path) == 0);
    }
    for (size_t i = 0; i < sizeof scripts / sizeof *scripts; i++)
        write_program(scripts[i].path, scripts[i].text);
    FILE *large = fopen("large.sh", "a");
    CHECK(large != NULL && fputs(long_text, large) >= 0 && fclose(large) == 0);

    IS(INIT_IMAGE, "/sbin/init", NULL, NULL);
    IS(INIT_IMAGE, "/lib/systemd/systemd", "--unit=x", NULL);
    IS(INIT_IMAGE, "systemd", NULL, NULL);
    IS(INIT_IMAGE, "/bin/init", NULL, NULL);
    IS(INIT_IMAGE, "busybox", "init", NULL);
    IS(INIT_IMAGE, "runit-init", NULL, NULL);
    IS(INIT_IMAGE, "/entry.sh", "/sbin/init", NULL);
    IS(INIT_IMAGE, "/systemd.sh", NULL, NULL);
    IS(INIT_IMAGE, "sh", "/systemd.sh", NULL);
    IS(INIT_IMAGE, "/bin/sh", "-c", "a=1; mount && exec /sbin/init");
    IS(INIT_IMAGE, "/choose.sh", NULL, NULL);
    IS(INIT_IMAGE, "/choose.sh", "systemd", NULL);
    IS(INIT_IMAGE, "/env.sh", NULL, NULL);
    IS(INIT_IMAGE, "env", "A=1", "/sbin/init");
    CHECK(judge("/srv", "./here", NULL, NULL) == INIT_IMAGE && judge("/", "./here", NULL, NULL) == INIT_AGENT);

    IS(INIT_COMMAND, "/init", "nginx", NULL);
    IS(INIT_COMMAND, "/usr/local/sbin/init", NULL, NULL);
    IS(INIT_COMMAND, "tini", "--", "nginx");
    IS(INIT_COMMAND, "/tini.sh", NULL, NULL);
    IS(INIT_COMMAND, "my_init", NULL, NULL);
    IS(INIT_COMMAND, "/entry.sh", "s6-svscan", "/etc/s6");

    IS(INIT_AGENT, "nginx", NULL, NULL);
    IS(INIT_AGENT, "bash", NULL, NULL);
    IS(INIT_AGENT, "bash", "-c", "echo /sbin/init");
    IS(INIT_AGENT, "ash", "-c", NULL);
    IS(INIT_AGENT, "busybox", "httpd", NULL);
    IS(INIT_AGENT, "/opt/init", NULL, NULL);
    IS(INIT_AGENT, "/entry.sh", "nginx", NULL);
    IS(INIT_AGENT, "/entry.sh", NULL, NULL);
    IS(INIT_AGENT, "/choose.sh", "nginx", NULL);
    IS(INIT_AGENT, "/gosu.sh", "nginx", NULL);
    IS(INIT_AGENT, "/quoted.sh", NULL, NULL);
    IS(INIT_AGENT, "/again.sh", NULL, NULL);
    IS(INIT_AGENT, "/python.sh", NULL, NULL);
    IS(INIT_AGENT, "/large.sh", NULL, NULL);
    IS(INIT_AGENT, "loop", NULL, NULL);
    IS(INIT_AGENT, "dangling", NULL, NULL);
    IS(INIT_AGENT, "/no/such", NULL, NULL);
    IS(INIT_AGENT, "", NULL, NULL);
    IS(INIT_AGENT, NULL, NULL, NULL);
    IS(INIT_AGENT, "/", NULL, NULL);

    /* /init that is a link to the init of a system, and a script at an init's place that starts a service. */
    CHECK(unlink("init") == 0 && symlink("sbin/init", "init") == 0);
    IS(INIT_IMAGE, "/init", NULL, NULL);
    CHECK(unlink("sbin/init") == 0);
    write_program("usr/sbin/init", "#!/bin/sh\nexec nginx\n");
    IS(INIT_COMMAND, "/sbin/init", NULL, NULL);
    write_program("usr/sbin/init", "#!/bin/execlineb -S0\ns6-linux-init -c /etc/s6\n");
    IS(INIT_IMAGE, "/sbin/init", NULL, NULL);
}

int main(void) {
    if (geteuid() != 0) {
        printf("skipped: it needs chroot, which needs root\n");
        return 0;
    }
    char root[] = "/tmp/banger-test-XXXXXX";
    CHECK(mkdtemp(root) != NULL && chdir(root) == 0);
    pid_t child = fork();
    if (child == 0) {
        CHECK(chroot(".") == 0);
        check_all();
        _exit(0); /* the leak check at exit needs /proc */
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", root);
    CHECK(chdir("/") == 0 && system(command) == 0);
    CHECK(status == 0);
}
