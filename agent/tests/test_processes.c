/* Tests the list of processes: its lines, its pages, and that it tells of processes what is true. */
#include <errno.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../system.h"
#include "check.h"

enum { CHILDREN = 300 }; /* more than one page holds */

static struct failure failure;

static void test_lines(void) {
    struct process_details details;
    CHECK(parse_process_details("7 (a) b (c) S 1 7 7 34816 7 4194560 1 2 3 4 500 60 7 8 20 0 9 0 1234 99999999 321 "
                                "18446744073709551615 1 1 0",
                                &details));
    CHECK(strcmp(details.name, "a) b (c") == 0 && details.condition == 'S' && details.parent == 1);
    CHECK(details.flags == 4194560 && details.used == 560 && details.threads == 9 && details.started == 1234);
    CHECK(details.resident == 321);
    char line[400] = "7 (";
    memset(line + 3, 'x', 200);
    strcpy(line + 203, ") R 1 7 7 0 7 1 1 2 3 4 500 60 7 8 20 0 9 0 1234 99999999 321");
    CHECK(parse_process_details(line, &details) && strlen(details.name) == 63);
    static const char *const bad[] = {"", "7", "7 (a", "7 )a(", "7 (a) S 1", "7 (a) S 1 7 7 34816 7 x", "()", ")("};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(!parse_process_details(bad[i], &details));
}

static void test_words(void) {
    static const struct {
        const char *words;
        size_t length;
        const char *joined;
    } cases[] = {{"a\0b c\0", 6, "a b c"}, {"title\0\0\0", 8, "title"}, {"", 0, ""}, {"\0\0", 2, ""}, {"\0a", 2, " a"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char words[16];
        memcpy(words, cases[i].words, cases[i].length);
        join_words(words, cases[i].length);
        CHECK(strcmp(words, cases[i].joined) == 0);
    }
}

/* The value of a field; its data is NULL when there is none. */
static struct bytes find(struct bytes fields, uint16_t wanted) {
    struct fields left = {.rest = fields};
    struct bytes value;
    uint16_t tag;
    while (fields_next(&left, &tag, &value))
        if (tag == wanted)
            return value;
    CHECK(!left.bad);
    return (struct bytes){0};
}

static uint64_t number(struct bytes fields, uint16_t tag) {
    uint64_t found;
    CHECK(value_number(find(fields, tag), &found));
    return found;
}

static bool has_text(struct bytes fields, uint16_t tag, const char *text) {
    struct bytes value = find(fields, tag);
    return value.length == strlen(text) && memcmp(value.data, text, value.length) == 0;
}

/* What a page says of a process, copied to `copy`; false when it is not on it. */
static bool on_page(const struct buffer *page, pid_t pid, struct buffer *copy) {
    struct fields left = {.rest = {page->data, page->length}};
    struct bytes value;
    uint16_t tag;
    while (fields_next(&left, &tag, &value))
        if (tag == TAG_PROCESS && number(value, TAG_PID) == (uint64_t)pid) {
            buffer_append(copy, value.data, value.length);
            return true;
        }
    return false;
}

static size_t count_entries(const struct buffer *page) {
    struct fields left = {.rest = {page->data, page->length}};
    struct bytes value;
    uint16_t tag;
    size_t count = 0;
    while (fields_next(&left, &tag, &value))
        count += tag == TAG_PROCESS;
    return count;
}

/* Reads all pages; how often `pid` was on them, and what the last of those said of it. */
static size_t look_for(pid_t pid, struct buffer *copy) {
    uint64_t first = 0;
    size_t found = 0;
    for (bool more = true; more;) {
        struct buffer request = {0}, page = {0};
        if (first > 0)
            put_number(&request, TAG_PID, first);
        struct fields fields = {.rest = {request.data, request.length}};
        CHECK(call_processes(&fields, &page, &failure) == 0 && page.length <= MAX_PAYLOAD);
        CHECK(count_entries(&page) <= 256);
        struct bytes all = {page.data, page.length};
        CHECK(number(all, TAG_UPTIME) > 0);
        buffer_free(copy);
        found += on_page(&page, pid, copy);
        more = find(all, TAG_MORE).data != NULL;
        CHECK(!more || number(all, TAG_MORE) > first);
        first = more ? number(all, TAG_MORE) : 0;
        if (found > 0)
            more = false;
        buffer_free(&request);
        buffer_free(&page);
    }
    return found;
}

static void test_own(void) {
    struct buffer copy = {0};
    CHECK(look_for(getpid(), &copy) == 1);
    struct bytes own = {copy.data, copy.length};
    CHECK(number(own, TAG_PARENT) == (uint64_t)getppid() && has_text(own, TAG_CONDITION, "R"));
    CHECK(number(own, TAG_RESIDENT) > 100000 && number(own, TAG_THREADS) >= 1 && number(own, TAG_STARTED) > 0);
    CHECK(has_text(own, TAG_NAME, "test_processes") && find(own, TAG_USER).length > 0);
    CHECK(find(own, TAG_COMMAND).length > strlen("test_processes") && find(own, TAG_KERNEL).data == NULL);
    buffer_free(&copy);
}

/* A name as a hostile program has it, another user, and one that has ended and was not waited for. */
static void test_child(bool ended) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        prctl(PR_SET_NAME, ") S 1 (\n");
        if (geteuid() == 0 && setuid(54321) < 0)
            _exit(1);
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* which a change of the user would take back */
        if (!ended)
            raise(SIGSTOP);
        _exit(0);
    }
    siginfo_t information;
    CHECK(waitid(P_PID, (id_t)child, &information, WSTOPPED | WEXITED | WNOWAIT) == 0);
    struct buffer copy = {0};
    CHECK(look_for(child, &copy) == 1);
    struct bytes said = {copy.data, copy.length};
    CHECK(number(said, TAG_PARENT) == (uint64_t)getpid() && has_text(said, TAG_CONDITION, ended ? "Z" : "T"));
    CHECK(has_text(said, TAG_NAME, ") S 1 (\n"));
    CHECK(geteuid() != 0 || has_text(said, TAG_USER, "54321"));
    CHECK((find(said, TAG_COMMAND).data == NULL) == ended);
    buffer_free(&copy);
    CHECK(kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child);
}

static void test_pages(void) {
    static pid_t children[CHILDREN];
    int ends[2];
    char byte;
    CHECK(pipe(ends) == 0);
    for (size_t i = 0; i < CHILDREN; i++) {
        children[i] = fork();
        CHECK(children[i] >= 0);
        if (children[i] == 0) {
            close(ends[1]);
            _exit((int)read(ends[0], &byte, 1)); /* until the parent closes its end, or has died */
        }
    }
    struct buffer copy = {0};
    for (size_t i = 0; i < CHILDREN; i += 13)
        CHECK(look_for(children[i], &copy) == 1);
    buffer_free(&copy);
    close(ends[0]);
    close(ends[1]);
    for (size_t i = 0; i < CHILDREN; i++)
        CHECK(waitpid(children[i], NULL, 0) == children[i]);
}

static void test_requests(void) {
    struct buffer request = {0}, page = {0};
    put_string(&request, TAG_PID, "one");
    struct fields fields = {.rest = {request.data, request.length}};
    CHECK(call_processes(&fields, &page, &failure) == EINVAL);
    buffer_free(&request);
    put_number(&request, TAG_PID, UINT64_MAX);
    fields = (struct fields){.rest = {request.data, request.length}};
    CHECK(call_processes(&fields, &page, &failure) == 0 && count_entries(&page) == 0);
    CHECK(find((struct bytes){page.data, page.length}, TAG_MORE).data == NULL);
    buffer_free(&request);
    buffer_free(&page);
}

int main(void) {
    test_lines();
    test_words();
    test_own();
    test_child(false);
    test_child(true);
    test_pages();
    test_requests();
    return 0;
}
