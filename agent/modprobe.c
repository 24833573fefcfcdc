/* The kernel's modprobe: finds the modules that a name stands for in the text indexes of depmod(8), and loads them. */
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "beneath.h"
#include "system.h"

enum {
    LINE_LIMIT = 65536, /* bytes; a longer line of an index counts for nothing */
    MAX_NEEDS = 256,    /* modules that one needs */
    MAX_MATCHES = 64,   /* modules with the same alias */
    MAX_MODULES = 256,  /* that one request loads, besides what each of them needs */
    COMPRESSED_FILE = 4 /* MODULE_INIT_COMPRESSED_FILE in <linux/module.h>, Linux 5.17 */
};

struct search {
    int modules;
    int (*load)(int modules, const char *path);
    char *begun[MAX_MODULES]; /* each is loaded once, also when soft dependencies go in a circle */
    size_t begun_count;
};

/* The names of modules and of aliases are equal when they differ in '-' and '_' alone, but not within brackets. */
static void normalise(char *name) {
    bool brackets = false;
    for (; *name; name++) {
        brackets = *name == '[' || (brackets && *name != ']');
        if (*name == '-' && !brackets)
            *name = '_';
    }
}

static FILE *open_index(const struct search *search, const char *name) {
    int fd = openat(search->modules, name, O_RDONLY | O_CLOEXEC);
    FILE *index = fd < 0 ? NULL : fdopen(fd, "r");
    if (fd >= 0 && !index)
        close(fd);
    return index;
}

/* The next line without its end; false at the end of the file. */
static bool next_line(FILE *index, char line[LINE_LIMIT]) {
    bool whole = true;
    while (fgets(line, LINE_LIMIT, index)) {
        size_t length = strlen(line);
        bool ended = length > 0 && line[length - 1] == '\n';
        if (whole && (ended || feof(index))) {
            line[strcspn(line, "\n")] = 0;
            return true;
        }
        whole = ended;
    }
    return false;
}

/* True when the file at `path` is the module `name`, a normalised name. */
static bool is_module(const char *path, const char *name) {
    const char *slash = strrchr(path, '/');
    char file[NAME_MAX + 1];
    snprintf(file, sizeof file, "%s", slash ? slash + 1 : path);
    char *end = strstr(file, ".ko");
    if (!end)
        return false;
    *end = 0;
    normalise(file);
    return strcmp(file, name) == 0;
}

/* The line "PATH: NEEDED..." of modules.dep for a module, or a line of modules.builtin. */
static bool find_module(const struct search *search, const char *list, const char *name, char line[LINE_LIMIT]) {
    FILE *index = open_index(search, list);
    bool found = false;
    while (index && !found && next_line(index, line)) {
        char *colon = strchr(line, ':');
        if (colon)
            *colon = 0;
        found = is_module(line, name);
        if (colon)
            *colon = ':';
    }
    if (index)
        fclose(index);
    return found;
}

/* What is needed first comes last in the line, after the module itself. */
static int load_files(const struct search *search, char *line) {
    char *words[MAX_NEEDS], *save, path[PATH_MAX];
    size_t count = 0;
    line[strcspn(line, ":")] = ' ';
    for (char *word = strtok_r(line, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
        if (count == MAX_NEEDS || *word == '/' || !normalise_name(word, path))
            return EINVAL;
        words[count++] = word;
    }
    int code = 0;
    while (count > 0 && !code)
        code = search->load(search->modules, words[--count]);
    return code;
}

static int load_name(struct search *search, const char *wanted);

/* Lines "softdep MODULE pre: NAME... post: NAME..."; that one of them is missing is no reason to fail. */
static void load_soft(struct search *search, const char *name, const char *when) {
    FILE *index = open_index(search, "modules.softdep");
    char *line = malloc(LINE_LIMIT), *save;
    while (index && line && next_line(index, line)) {
        char *word = strtok_r(line, " ", &save), *module = word ? strtok_r(NULL, " ", &save) : NULL;
        if (!module || strcmp(word, "softdep") != 0)
            continue;
        normalise(module);
        bool due = false;
        while (strcmp(module, name) == 0 && (word = strtok_r(NULL, " ", &save))) {
            if (word[strlen(word) - 1] == ':')
                due = strcmp(word, when) == 0;
            else if (due)
                load_name(search, word);
        }
    }
    if (index)
        fclose(index);
    free(line);
}

/* False when this request has begun with the module already, or with too many. */
static bool begin(struct search *search, const char *name) {
    for (size_t i = 0; i < search->begun_count; i++)
        if (strcmp(search->begun[i], name) == 0)
            return false;
    char *copy = search->begun_count < MAX_MODULES ? strdup(name) : NULL;
    if (copy)
        search->begun[search->begun_count++] = copy;
    return copy;
}

/* ENOENT when there is no such module. */
static int load_module(struct search *search, const char *name) {
    char *line = malloc(LINE_LIMIT);
    int code = line ? ENOENT : ENOMEM;
    if (line && find_module(search, "modules.dep", name, line)) {
        code = 0;
        if (begin(search, name)) {
            load_soft(search, name, "pre:");
            if (!(code = load_files(search, line)))
                load_soft(search, name, "post:");
        }
    } else if (line && find_module(search, "modules.builtin", name, line)) {
        code = 0;
    }
    free(line);
    return code;
}

/* Lines "alias PATTERN MODULE": all modules whose pattern fits, in their order; how many. */
static size_t find_alias(const struct search *search, const char *list, const char *name, char *found[MAX_MATCHES]) {
    FILE *index = open_index(search, list);
    char *line = malloc(LINE_LIMIT), *save;
    size_t count = 0;
    while (index && line && count < MAX_MATCHES && next_line(index, line)) {
        const char *word = strtok_r(line, " ", &save);
        char *pattern = word ? strtok_r(NULL, " ", &save) : NULL, *module = pattern ? strtok_r(NULL, " ", &save) : NULL;
        if (!module || strcmp(word, "alias") != 0)
            continue;
        normalise(pattern);
        if (fnmatch(pattern, name, 0) != 0 || !(found[count] = strdup(module)))
            continue;
        normalise(found[count++]);
    }
    if (index)
        fclose(index);
    free(line);
    return count;
}

static int load_name(struct search *search, const char *wanted) {
    char name[NAME_MAX + 1], *found[MAX_MATCHES];
    if (snprintf(name, sizeof name, "%s", wanted) >= (int)sizeof name)
        return ENAMETOOLONG;
    normalise(name);
    int code = load_module(search, name);
    if (code != ENOENT)
        return code;
    size_t count = find_alias(search, "modules.alias", name, found);
    if (count == 0)
        count = find_alias(search, "modules.symbols", name, found);
    for (size_t i = 0; i < count; i++) {
        int one = load_module(search, found[i]);
        code = code ? one : 0; /* one is enough: the others are for other hardware */
        free(found[i]);
    }
    return code;
}

int modprobe(int modules, const char *name, int (*load)(int modules, const char *path)) {
    struct search search = {.modules = modules, .load = load};
    int code = load_name(&search, name);
    while (search.begun_count > 0)
        free(search.begun[--search.begun_count]);
    return code;
}

/* One that another process has loaded meanwhile is as good. One for hardware that is not there is usual: several may
 * have the same alias. */
static int load_file(int modules, const char *path) {
    size_t length = strlen(path);
    bool compressed = length < 3 || strcmp(path + length - 3, ".ko") != 0;
    int fd = openat(modules, path, O_RDONLY | O_CLOEXEC);
    int code = fd < 0 || syscall(SYS_finit_module, fd, "", compressed ? COMPRESSED_FILE : 0) < 0 ? errno : 0;
    if (code && code != EEXIST && code != ENODEV)
        console_print("cannot load the kernel module %s: %s", path, strerror(code));
    if (fd >= 0)
        close(fd);
    return code == EEXIST ? 0 : code;
}

/* kmod keeps to what the image says in /etc/modprobe.d. The modprobe of busybox reads other indexes and compressions
 * than the kernel's modules may have. */
static void execute_kmod(char **arguments) {
    static const char *const programs[] = {"/sbin/modprobe", "/usr/sbin/modprobe", "/bin/modprobe", "/usr/bin/modprobe"};
    for (size_t i = 0; i < sizeof programs / sizeof *programs; i++) {
        char *real = realpath(programs[i], NULL);
        const char *name = real ? strrchr(real, '/') + 1 : "";
        if (real && strncmp(name, "busybox", 7) != 0 && strncmp(name, "toybox", 6) != 0) {
            arguments[0] = (char *)programs[i]; /* by its name kmod knows what to do */
            execv(programs[i], arguments);
        }
        free(real);
    }
}

/* The kernel says "-q -- NAME", iptables "NAME -q". */
int modprobe_main(int count, char **arguments) {
    execute_kmod(arguments);
    const char *name = NULL;
    for (int i = 1; i < count; i++) {
        if (strcmp(arguments[i], "-q") == 0 || strcmp(arguments[i], "--") == 0)
            continue;
        if (name || *arguments[i] == '-') {
            fprintf(stderr, "usage: " MODPROBE " [-q] MODULE; the image has no kmod, which does more\n");
            return 2;
        }
        name = arguments[i];
    }
    int modules = name ? modules_open() : -1;
    return modules < 0 || modprobe(modules, name, load_file) ? 1 : 0;
}
