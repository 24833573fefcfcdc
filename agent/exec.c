/* Commands: their request, terminal, environment, user, and the way to execve. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <search.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#include "call.h"
#include "namespace.h"
#include "process.h"
#include "session.h"

enum { PATH_LIMIT = 4096 };

/* What the child knows: it reads the rest of the request itself, so that nothing has to be freed or kept. */
struct command {
    struct bytes request;
    bool terminal;
};

/* In the child ---------------------------------------------------------------------------------------------------- */

struct strings {
    char **items;
    size_t count;
};

/* The values of one tag as strings, with room for `extra` more; NULL items when one of them is bad. */
static struct strings read_strings(struct bytes request, uint16_t wanted, size_t extra) {
    struct fields fields = {request, false};
    struct strings strings = {calloc(request.length / 6 + extra + 1, sizeof(char *)), 0};
    uint16_t tag;
    struct bytes value;
    while (strings.items != NULL && fields_next(&fields, &tag, &value)) {
        if (tag != wanted)
            continue;
        char *text = value_string(value, MAX_REQUEST);
        if (text == NULL)
            return (struct strings){NULL, 0};
        strings.items[strings.count++] = text;
    }
    return strings;
}

static int compare_names(const void *left, const void *right) {
    const char *a = *(char *const *)left, *b = *(char *const *)right;
    while (*a == *b && *a != '=')
        a++, b++;
    return (*a != '=' ? (unsigned char)*a : 0) - (*b != '=' ? (unsigned char)*b : 0);
}

/* Adds NAME=value, replacing an earlier value of that name; there may be as many as fit into 2 MiB. */
static void set_variable(struct strings *environment, char *variable) {
    static void *names; /* where the variable of each name stands */
    char **place = &environment->items[environment->count];
    *place = variable;
    char ***found = tsearch(place, &names, compare_names);
    if (found == NULL || *found == place) {
        environment->count++;
    } else {
        **found = variable;
        *place = NULL;
    }
}

static char *variable(const char *name, const char *value) {
    char *text = NULL;
    return asprintf(&text, "%s=%s", name, value) < 0 ? NULL : text;
}

/* The usual variables, those of configure, those of the request; the later one wins. */
static int make_environment(const struct account *account, struct bytes request, struct strings *environment,
                            struct failure *failure) {
    struct strings given = read_strings(request, TAG_ENV, 0);
    char hostname[HOST_NAME_MAX + 1] = "";
    gethostname(hostname, sizeof hostname - 1);
    char *usual[] = {variable("PATH", USUAL_PATH),       variable("HOSTNAME", hostname),
                     variable("HOME", account->home),    variable("USER", account->name),
                     variable("LOGNAME", account->name), variable("SHELL", account->shell)};
    size_t usual_count = sizeof usual / sizeof usual[0], configured = 0;
    while (configured_environment != NULL && configured_environment[configured] != NULL)
        configured++;
    *environment = (struct strings){calloc(usual_count + configured + given.count + 1, sizeof(char *)), 0};
    if (given.items == NULL || environment->items == NULL)
        return fail(failure, EINVAL, "an environment variable holds a NUL byte");
    for (size_t i = 0; i < usual_count; i++) {
        if (usual[i] == NULL)
            return fail(failure, ENOMEM, "the guest is out of memory");
        set_variable(environment, usual[i]);
    }
    for (size_t i = 0; i < configured; i++)
        set_variable(environment, configured_environment[i]);
    for (size_t i = 0; i < given.count; i++) {
        if (given.items[i][0] == '=' || strchr(given.items[i], '=') == NULL)
            return fail(failure, EINVAL, "'%.80s' is not NAME=value", given.items[i]);
        set_variable(environment, given.items[i]);
    }
    return 0;
}

/* Programs open /dev/stdout and the like anew, by the permissions of the pipe that it is. So it becomes the user's, and
 * those may open it who become somebody else later. No others come by it: it has no name but in /proc of its holders. */
static void give_streams(const struct account *account) {
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++) {
        struct stat status;
        if (fstat(fd, &status) == 0 && S_ISFIFO(status.st_mode) && fchown(fd, account->uid, (gid_t)-1) == 0)
            fchmod(fd, 0666);
    }
}

static int become(const struct account *account, struct failure *failure) {
    if (geteuid() != 0 && account->uid == geteuid())
        return 0;
    if (setgroups(account->group_count, account->groups) != 0 ||
        setresgid(account->gid, account->gid, account->gid) != 0 ||
        setresuid(account->uid, account->uid, account->uid) != 0)
        return fail(failure, errno, "cannot become user '%s': %s", account->name, strerror(errno));
    return 0;
}

/* ENOTDIR stands for every bad directory: any other number is about the command. */
static int enter_directory(const struct account *account, struct strings directory, struct failure *failure) {
    if (directory.items == NULL)
        return fail(failure, EINVAL, "the working directory holds a NUL byte");
    if (directory.count == 0)
        return chdir(account->home) == 0 || chdir("/") == 0 ? 0 : fail(failure, errno, "cannot enter /");
    const char *path = directory.items[directory.count - 1];
    if (chdir(path) != 0)
        return fail(failure, ENOTDIR, "cannot enter the working directory '%s': %s", path, strerror(errno));
    return 0;
}

/* Executes `path`; returns when that fails. */
static void execute(const char *path, char **arguments, char **environment, struct failure *failure) {
    execve(path, arguments, environment);
    int code = errno;
    if (code == ENOENT && access(path, F_OK) == 0)
        fail(failure, ENOEXEC, "the interpreter or dynamic loader that '%s' asks for does not exist", path);
    else if (code == ENOENT || code == ENOTDIR)
        fail(failure, ENOENT, "there is no command '%s'", path);
    else
        fail(failure, code, "cannot execute '%s': %s", path, strerror(code));
}

static const char *search_path(char **environment) {
    for (; *environment != NULL; environment++)
        if (strncmp(*environment, "PATH=", 5) == 0)
            return *environment + 5;
    return USUAL_PATH;
}

/* As execvp(3), but a file that is no program is an error and not a shell script. */
static void search_and_execute(const char *name, char **arguments, char **environment, struct failure *failure) {
    const char *path = search_path(environment);
    struct failure found = {0};
    while (path != NULL) {
        const char *end = strchrnul(path, ':');
        char candidate[PATH_LIMIT];
        int length = snprintf(candidate, sizeof candidate, "%.*s%s%s", (int)(end - path), path, end > path ? "/" : "./",
                              name);
        path = *end != 0 ? end + 1 : NULL;
        if (length >= PATH_LIMIT)
            continue;
        execute(candidate, arguments, environment, failure);
        /* What exists in one directory and cannot be executed may be fine in a later one. */
        if (access(candidate, F_OK) == 0 && found.code == 0)
            found = *failure;
        if (failure->code != ENOENT && failure->code != EACCES && failure->code != ENOEXEC)
            break;
    }
    if (found.code != 0)
        *failure = found;
    else
        fail(failure, ENOENT, "there is no command '%.200s' in PATH (%.200s)", name, search_path(environment));
}

static int take_terminal(const struct account *account, struct failure *failure) {
    if (ioctl(STDIN_FILENO, TIOCSCTTY, 0) != 0)
        return fail(failure, errno, "cannot take the terminal: %s", strerror(errno));
    /* Programs open /dev/tty or the pty by its name again; without privileges it is the user's own already. */
    if (fchown(STDIN_FILENO, account->uid, (gid_t)-1) == 0)
        fchmod(STDIN_FILENO, 0620);
    return 0;
}

static void run_command(const void *context, struct failure *failure) {
    const struct command *command = context;
    struct account account;
    struct strings environment;
    struct strings arguments = read_strings(command->request, TAG_ARG, 1);
    struct strings user = read_strings(command->request, TAG_USER, 0);
    if (arguments.items == NULL || user.items == NULL) {
        fail(failure, EINVAL, "an argument or the user holds a NUL byte");
        return;
    }
    if (account_find(user.count > 0 ? user.items[user.count - 1] : "root", &account, failure) != 0 ||
        make_environment(&account, command->request, &environment, failure) != 0 ||
        (command->terminal && take_terminal(&account, failure) != 0))
        return;
    give_streams(&account);
    if (become(&account, failure) != 0 ||
        enter_directory(&account, read_strings(command->request, TAG_CWD, 0), failure) != 0)
        return;
    if (arguments.count == 0) {
        const char *slash = strrchr(account.shell, '/');
        char name[sizeof account.shell + 1];
        snprintf(name, sizeof name, "-%s", slash != NULL ? slash + 1 : account.shell);
        execute(account.shell, (char *[]){name, NULL}, environment.items, failure);
    } else if (strchr(arguments.items[0], '/') != NULL) {
        execute(arguments.items[0], arguments.items, environment.items, failure);
    } else if (arguments.items[0][0] == 0) {
        fail(failure, ENOENT, "the name of the command is empty");
    } else {
        search_and_execute(arguments.items[0], arguments.items, environment.items, failure);
    }
}

/* In the agent ---------------------------------------------------------------------------------------------------- */

static int open_terminal(struct plumbing *plumbing, uint64_t size, struct failure *failure) {
    struct winsize window = {.ws_row = (uint16_t)(size >> 16), .ws_col = (uint16_t)size};
    int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (master < 0)
        return fail(failure, errno, "cannot make a terminal: %s", strerror(errno));
    plumbing->output[0] = master;
    if (unlockpt(master) != 0 || ioctl(master, TIOCSWINSZ, &window) != 0)
        return fail(failure, errno, "cannot prepare the terminal: %s", strerror(errno));
    /* Not by its name: the image may have mounted something over /dev/pts. */
    int slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    plumbing->child[0] = plumbing->child[1] = plumbing->child[2] = slave;
    plumbing->input = fcntl(master, F_DUPFD_CLOEXEC, 0);
    if (slave < 0 || plumbing->input < 0)
        return fail(failure, errno, "cannot open the terminal: %s", strerror(errno));
    return 0;
}

static int open_null(int *fd, int mode, struct failure *failure) {
    *fd = open("/dev/null", mode | O_CLOEXEC);
    return *fd >= 0 ? 0 : fail(failure, errno, "cannot open /dev/null: %s", strerror(errno));
}

static int open_pipes(struct plumbing *plumbing, uint64_t flags, struct failure *failure) {
    int code = flags & EXEC_DETACHED ? open_null(&plumbing->child[0], O_RDONLY, failure)
                                     : plumbing_pipe(&plumbing->child[0], &plumbing->input, false, failure);
    for (int i = 0; i < 2 && code == 0; i++)
        code = (flags & (EXEC_DETACHED | EXEC_LOG)) == EXEC_DETACHED
                   ? open_null(&plumbing->child[1 + i], O_WRONLY, failure)
                   : plumbing_pipe(&plumbing->output[i], &plumbing->child[1 + i], true, failure);
    return code;
}

/* REPLY once the child has become the command, ERROR when it reports why it could not. */
static bool exec_start(struct channel *channel) {
    struct failure failure;
    int reported = process_report(&channel->report, &failure);
    if (reported < 0)
        return false;
    if (reported > 0) {
        process_main_failed(channel->pid);
        channel_fail(channel, &failure);
        return true;
    }
    struct buffer reply = {0};
    process_main_started(channel->pid);
    put_number(&reply, TAG_PID, (uint64_t)channel->pid);
    channel_reply(channel, &reply);
    buffer_free(&reply);
    if (channel->flags & EXEC_DETACHED) {
        channel->id = 0;
        watch_close(&channel->input);
    }
    return true;
}

int exec_open(struct channel *channel, struct bytes request, struct failure *failure) {
    struct fields fields = {request, false};
    struct command command = {request, false};
    struct plumbing plumbing = plumbing_empty;
    uint64_t size = 0;
    uint16_t tag;
    struct bytes value;
    while (fields_next(&fields, &tag, &value)) {
        uint64_t *number = tag == TAG_TERMINAL ? &size : tag == TAG_FLAGS ? &channel->flags : NULL;
        if (number != NULL && !value_number(value, number))
            return fail(failure, EINVAL, "the size of a terminal, and flags, are numbers");
        command.terminal |= tag == TAG_TERMINAL;
    }
    if ((channel->flags & EXEC_MAIN) && !process_main_reserve())
        return fail(failure, EBUSY, "the main command is still running");
    if ((channel->flags & EXEC_INIT) && namespace_there())
        return fail(failure, EBUSY, "a command is PID 1 already, and still running");
    channel->terminal = command.terminal;
    channel->start = exec_start;
    int code = command.terminal ? open_terminal(&plumbing, size, failure)
                                : open_pipes(&plumbing, channel->flags, failure);
    if (code != 0) {
        plumbing_close(&plumbing);
        return code;
    }
    code = process_spawn(channel, &plumbing, run_command, &command, failure);
    if (code == 0 && (channel->flags & EXEC_MAIN))
        process_main_spawned(channel->pid);
    return code;
}
