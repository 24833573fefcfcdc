/* File trees: tar streams, made and extracted in a child process. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "call.h"
#include "process.h"

enum { PATH_LIMIT = 4096 };

struct tree {
    struct bytes request;
    bool write;
};

/* In the child: the request as a path, flags and an owner. */
static int read_request(const struct tree *tree, char **path, struct tree_options *options, struct failure *failure) {
    struct fields fields = {tree->request, false};
    struct account account;
    uint16_t tag;
    struct bytes value;
    while (fields_next(&fields, &tag, &value)) {
        if (tag == TAG_PATH && (*path = value_string(value, PATH_LIMIT)) == NULL)
            return fail(failure, EINVAL, "the path is longer than %d bytes or holds a NUL byte", PATH_LIMIT);
        if (tag == TAG_FLAGS && !value_number(value, &options->flags))
            return fail(failure, EINVAL, "flags are a number");
        if (tag != TAG_USER || !tree->write)
            continue;
        char *user = value_string(value, PATH_LIMIT);
        if (user == NULL)
            return fail(failure, EINVAL, "the owner holds a NUL byte");
        if (account_find(user, &account, failure) != 0)
            return failure->code;
        options->set_owner = true;
        options->uid = account.uid;
        options->gid = account.gid;
    }
    return *path != NULL && (*path)[0] == '/' ? 0 : fail(failure, EINVAL, "a tree needs an absolute path");
}

static void run_tree(const void *context, struct failure *failure) {
    const struct tree *tree = context;
    struct tree_options options = {0};
    char *path = NULL;
    if (read_request(tree, &path, &options, failure) != 0)
        return;
    int result = tree->write ? tar_extract(STDIN_FILENO, path, &options, failure)
                             : tar_create(STDOUT_FILENO, path, &options, failure);
    if (result == 0)
        _exit(0);
}

static int tree_open(struct channel *channel, struct bytes request, bool write, struct failure *failure) {
    struct tree tree = {request, write};
    struct plumbing plumbing = plumbing_empty;
    int code = write ? plumbing_pipe(&plumbing.child[0], &plumbing.input, false, failure)
                     : plumbing_pipe(&plumbing.output[0], &plumbing.child[1], true, failure);
    if (code != 0)
        return code;
    code = process_spawn(channel, &plumbing, run_tree, &tree, failure);
    if (code != 0)
        return code;
    channel->tree = true;
    channel_reply(channel, &(struct buffer){0});
    return 0;
}

int write_tree_open(struct channel *channel, struct bytes request, struct failure *failure) {
    return tree_open(channel, request, true, failure);
}

int read_tree_open(struct channel *channel, struct bytes request, struct failure *failure) {
    return tree_open(channel, request, false, failure);
}
