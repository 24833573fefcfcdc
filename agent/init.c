/* What a main command is: an ordinary one, an init of containers, which wants to be PID 1, or the init of a system. */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TEXT_LIMIT = 128 * 1024, WORD_LIMIT = 512, DEEPEST = 5, MOST_WORDS = 64 };

/* Each is judged in the place that the earlier ones have led to. */
struct place {
    const char *directory, *path;
    int depth;
};

static uint64_t judge(char **words, struct place place);

static bool is_one_of(const char *name, const char *const *names) {
    for (; *names != NULL; names++)
        if (strcmp(name, *names) == 0)
            return true;
    return false;
}

static const char *base(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash != NULL ? slash + 1 : path;
}

/* By the name of their program: those that run a whole system, ... */
static bool is_system(const char *name) {
    static const char *const names[] = {"systemd", "openrc-init", "runit-init", "s6-linux-init", "finit", "sysvinit",
                                        "upstart", NULL};
    return is_one_of(name, names);
}

/* ... and those that run a container, some of which refuse to be anything but PID 1. */
static bool is_container(const char *name) {
    static const char *const names[] = {"s6-svscan",    "s6-overlay-suexec", "s6-overlay-init", "my_init", "runsvdir",
                                        "runsvdir-start", "dinit", NULL};
    return is_one_of(name, names) || init_is_modest(name);
}

bool init_is_modest(const char *word) {
    static const char *const names[] = {"tini", "tini-static", "dumb-init", "docker-init", "catatonit", NULL};
    return is_one_of(base(word), names);
}

static bool is_shell(const char *name) {
    static const char *const names[] = {"sh", "bash", "dash", "ash", "ksh", "mksh", "zsh", NULL};
    return is_one_of(name, names);
}

/* Where an init of a system is by custom. */
static bool is_init_place(const char *path) {
    static const char *const places[] = {"/sbin/init", "/usr/sbin/init", "/usr/local/sbin/init", "/bin/init",
                                         "/usr/bin/init", NULL};
    return is_one_of(path, places);
}

bool program_find(const char *name, const char *directory, const char *path, char found[PATH_MAX]) {
    bool search = strchr(name, '/') == NULL;
    if (*name == 0)
        return false;
    for (const char *end; path != NULL; path = *end != 0 ? end + 1 : NULL) {
        end = search ? strchrnul(path, ':') : "";
        const char *begin = search ? path : "";
        bool relative = search ? *begin != '/' : *name != '/';
        int length = snprintf(found, PATH_MAX, "%s%s%.*s%s%s", relative ? directory : "", relative ? "/" : "",
                              search ? (int)(end - begin) : 0, begin, search ? "/" : "", name);
        struct stat status;
        if (length < PATH_MAX && stat(found, &status) == 0 && S_ISREG(status.st_mode) && access(found, X_OK) == 0)
            return true;
        if (!search)
            return false;
    }
    return false;
}

/* The beginning of a file as a string, to be freed. */
static char *read_text(const char *path) {
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    char *text = fd >= 0 ? malloc(TEXT_LIMIT + 1) : NULL;
    size_t length = 0;
    ssize_t count = 1;
    while (text != NULL && length < TEXT_LIMIT && (count = read(fd, text + length, TEXT_LIMIT - length)) > 0)
        length += (size_t)count;
    if (fd >= 0)
        close(fd);
    if (text != NULL)
        text[length] = 0;
    return text;
}

/* Reads the next word of a shell's text, quotes and backslashes taken away; false at the end of a simple command, which
 * is skipped, and with *text at its end at the end of all. */
static bool next_word(const char **text, char word[WORD_LIMIT]) {
    size_t length = 0;
    char quote = 0;
    bool any = false;
    const char *at = *text;
    while (*at == ' ' || *at == '\t' || (at[0] == '\\' && at[1] == '\n'))
        at += *at == '\\' ? 2 : 1;
    if (*at == '#')
        at += strcspn(at, "\n");
    for (; *at != 0; at++) {
        if (quote == 0 && strchr(" \t\n;()|", *at) != NULL)
            break;
        /* Not those of 2>&1 and &>file. */
        if (quote == 0 && *at == '&' && (!any || (at[-1] != '>' && at[-1] != '<')) && at[1] != '>')
            break;
        any = true;
        if (quote == *at && quote != 0)
            quote = 0;
        else if (quote == 0 && (*at == '"' || *at == '\''))
            quote = *at;
        else if (*at == '\\' && quote != '\'' && at[1] != 0 && at[1] != '\n')
            word[length++] = *++at;
        else
            word[length++] = *at;
        if (length == WORD_LIMIT - 1)
            length--; /* so long a word is none that matters */
    }
    word[length] = 0;
    *text = at;
    if (!any && *at != 0)
        (*text)++;
    return any;
}

static bool is_redirection(const char *word) {
    word += strspn(word, "0123456789&");
    return *word == '<' || *word == '>';
}

static bool is_assignment(const char *word) {
    size_t name = strspn(word, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_");
    return name > 0 && word[name] == '=';
}

static bool is_all_arguments(const char *word) {
    return strcmp(word, "$@") == 0 || strcmp(word, "${@}") == 0 || strcmp(word, "$*") == 0;
}

/* What a shell becomes by the last `exec` of a text that leads anywhere; INIT_AUTO when there is none. */
static uint64_t judge_text(const char *text, char **arguments, struct place place) {
    uint64_t judged = INIT_AUTO;
    char word[WORD_LIMIT];
    while (*text != 0) {
        if (!next_word(&text, word) || strcmp(word, "exec") != 0)
            continue;
        char *words[MOST_WORDS + 1] = {NULL};
        size_t own = 0, count = 0;
        bool options = true;
        while (next_word(&text, word)) {
            if (is_redirection(word)) {
                if (word[strlen(word) - 1] == '<' || word[strlen(word) - 1] == '>')
                    next_word(&text, word);
                continue;
            }
            if (options && count == 0 && *word == '-') {
                options = strcmp(word, "--") != 0;
                if (strcmp(word, "-a") == 0)
                    next_word(&text, word);
                continue;
            }
            if (is_all_arguments(word)) {
                for (size_t i = 0; arguments[i] != NULL && count < MOST_WORDS; i++)
                    words[count++] = arguments[i];
                break;
            }
            if (count == MOST_WORDS || (words[count] = strdup(word)) == NULL)
                break;
            own = ++count;
        }
        if (count > 0)
            judged = judge(words, place);
        while (own > 0)
            free(words[--own]);
    }
    return judged;
}

/* A script that begins with #!, by its text when a shell reads it; INIT_AUTO when it says nothing. */
static uint64_t judge_script(const char *path, char **arguments, struct place place) {
    char *text = read_text(path), interpreter[WORD_LIMIT];
    uint64_t judged = INIT_AUTO;
    if (text != NULL && text[0] == '#' && text[1] == '!') {
        const char *rest = text + 2;
        bool shell = next_word(&rest, interpreter) && is_shell(base(interpreter));
        if (!shell && strcmp(base(interpreter), "env") == 0)
            shell = next_word(&rest, interpreter) && is_shell(interpreter);
        if (!shell && strcmp(base(interpreter), "busybox") == 0)
            shell = true;
        if (shell)
            judged = judge_text(text + strcspn(text, "\n"), arguments, place);
    }
    free(text);
    return judged;
}

static bool begins_with(const char *path, const char *begin) {
    char start[4] = "";
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    bool same = fd >= 0 && read(fd, start, strlen(begin)) == (ssize_t)strlen(begin) &&
                memcmp(start, begin, strlen(begin)) == 0;
    if (fd >= 0)
        close(fd);
    return same;
}

/* sh FILE and sh -c TEXT: what the shell becomes in the end. */
static uint64_t judge_shell(char **words, struct place place) {
    bool text = false;
    size_t i = 1;
    for (; words[i] != NULL && (words[i][0] == '-' || words[i][0] == '+') && words[i][1] != 0; i++)
        text |= words[i][0] == '-' && words[i][1] != '-' && strchr(words[i], 'c') != NULL;
    if (words[i] == NULL)
        return INIT_AGENT;
    uint64_t judged = INIT_AUTO;
    if (text) {
        judged = judge_text(words[i], words[i + 1] != NULL ? words + i + 2 : words + i + 1, place);
    } else {
        char path[PATH_MAX];
        int length = snprintf(path, sizeof path, "%s%s%s", words[i][0] == '/' ? "" : place.directory,
                              words[i][0] == '/' ? "" : "/", words[i]);
        char *script = length < PATH_MAX ? read_text(path) : NULL;
        if (script != NULL)
            judged = judge_text(script, words + i + 1, place);
        free(script);
    }
    return judged == INIT_AUTO ? INIT_AGENT : judged;
}

static uint64_t judge(char **words, struct place place) {
    char found[PATH_MAX], real[PATH_MAX];
    if (words[0] == NULL || place.depth++ == DEEPEST ||
        !program_find(words[0], place.directory, place.path, found) || realpath(found, real) == NULL)
        return INIT_AGENT;
    const char *name = base(real), *given = base(found);
    /* One program with many names goes by that which it is called. */
    if (strcmp(name, "busybox") == 0 && strcmp(given, "busybox") == 0 && words[1] != NULL)
        return strcmp(words[1], "init") == 0 ? INIT_IMAGE : is_shell(words[1]) ? judge_shell(words + 1, place) : INIT_AGENT;
    if (is_system(name) || is_system(given))
        return INIT_IMAGE;
    if (is_container(name) || is_container(given))
        return INIT_COMMAND;
    bool by_place = is_init_place(found) || is_init_place(real);
    bool of_container = strcmp(found, "/init") == 0 || strcmp(real, "/init") == 0;
    if (is_shell(given) && !by_place && !of_container)
        return judge_shell(words, place);
    if (strcmp(given, "env") == 0) {
        size_t i = 1;
        while (words[i] != NULL && (words[i][0] == '-' || is_assignment(words[i])))
            i++;
        return judge(words + i, place);
    }
    uint64_t judged = begins_with(real, "#!") ? judge_script(real, words + 1, place) : INIT_AUTO;
    if (judged == INIT_AGENT && (by_place || of_container))
        return INIT_COMMAND; /* a service, started as an init is */
    if (judged != INIT_AUTO)
        return judged;
    return by_place ? INIT_IMAGE : of_container ? INIT_COMMAND : INIT_AGENT;
}

uint64_t init_judge(char **words, const char *directory, const char *path) {
    return judge(words, (struct place){directory, path, 0});
}
