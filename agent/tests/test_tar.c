/* Tests the numbers and records of tar; with arguments, runs what tests/process/test_agent_tar.py asks for:
 *
 *   test_tar extract PATH [UID GID] < TAR
 *   test_tar create PATH FLAGS > TAR
 *   test_tar stat PATH FLAGS
 *
 * A failure is printed as "ERRNO MESSAGE" and ends with status 1.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../tar.h"
#include "check.h"

static struct bytes text(const char *string) {
    return (struct bytes){(const uint8_t *)string, strlen(string)};
}

static void test_header_numbers(void) {
    int64_t number;
    CHECK(header_number("0000644", 8, &number) && number == 0644);
    CHECK(header_number("  644 \0", 8, &number) && number == 0644);
    CHECK(header_number("77777777777", 11, &number) && number == 077777777777);
    CHECK(header_number("\0\0\0\0\0\0\0", 8, &number) && number == 0);
    CHECK(!header_number("0000648", 8, &number));
    CHECK(!header_number("-000001", 8, &number));
    CHECK(header_number("\x80\0\0\0\0\0\0\0\0\0\1\0", 12, &number) && number == 256);
    CHECK(header_number("\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", 12, &number) && number == INT64_MAX);
    CHECK(!header_number("\x80\0\0\0\x80\0\0\0\0\0\0\0", 12, &number));
    CHECK(!header_number("\x80\0\1\0\0\0\0\0\0\0\0\0", 12, &number));
    CHECK(header_number("\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", 12, &number) && number == -2);
    CHECK(header_number("\xff\xff\xff\xff\x80\0\0\0\0\0\0\0", 12, &number) && number == INT64_MIN);
    CHECK(!header_number("\xff\0\xff\xff\x80\0\0\0\0\0\0\0", 12, &number));
}

static void test_decimals(void) {
    uint64_t number;
    struct timespec time;
    CHECK(decimal_number(text("18446744073709551615"), &number) && number == UINT64_MAX);
    CHECK(!decimal_number(text("18446744073709551616"), &number));
    CHECK(!decimal_number(text(""), &number) && !decimal_number(text("-1"), &number));
    CHECK(decimal_time(text("12.5"), &time) && time.tv_sec == 12 && time.tv_nsec == 500000000);
    CHECK(decimal_time(text("12"), &time) && time.tv_sec == 12 && time.tv_nsec == 0);
    CHECK(decimal_time(text("-1.25"), &time) && time.tv_sec == -2 && time.tv_nsec == 750000000);
    CHECK(decimal_time(text("-3"), &time) && time.tv_sec == -3 && time.tv_nsec == 0);
    CHECK(decimal_time(text("1.0000000019"), &time) && time.tv_sec == 1 && time.tv_nsec == 1);
    CHECK(!decimal_time(text("1.x"), &time) && !decimal_time(text("99999999999999999999"), &time));
}

static void test_pax_records(void) {
    struct buffer records = {0};
    struct bytes key, value;
    bool bad = false;
    char long_value[95];
    memset(long_value, 'v', sizeof long_value);
    /* 99 bytes without the length's digits: three of them make it 102 */
    pax_append(&records, "k", long_value, sizeof long_value);
    pax_append(&records, "empty", "", 0);
    struct bytes rest = {records.data, records.length};
    CHECK(memcmp(rest.data, "102 k=", 6) == 0);
    CHECK(pax_next(&rest, &key, &value, &bad) && bytes_equal(key, "k") && value.length == sizeof long_value);
    CHECK(pax_next(&rest, &key, &value, &bad) && bytes_equal(key, "empty") && value.length == 0);
    CHECK(!pax_next(&rest, &key, &value, &bad) && !bad);
    buffer_free(&records);
    const char *malformed[] = {"x",         "9 a=b\n",  "5 a=b\n", "6 abc\n", "-6 a=b\n", "99999999999999999999 a=b\n",
                               " a=b\n", "3 \n"};
    for (size_t i = 0; i < sizeof malformed / sizeof *malformed; i++) {
        rest = text(malformed[i]);
        bad = false;
        CHECK(!pax_next(&rest, &key, &value, &bad) && bad);
    }
}

static void test_xattr_keys(void) {
    char key[XATTR_KEY_SIZE], name[XATTR_KEY_SIZE];
    xattr_to_key("user.a=b%c", key);
    CHECK(strcmp(key, "SCHILY.xattr.user.a%3Db%25c") == 0);
    CHECK(xattr_from_key(text(key), name) && strcmp(name, "user.a=b%c") == 0);
    CHECK(!xattr_from_key(text("SCHILY.xattr."), name) && !xattr_from_key(text("SCHILY.acl"), name));
}

static void test_shown_names(void) {
    CHECK(strcmp(SHOW("a/\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"), "a/\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80") == 0);
    CHECK(strcmp(SHOW("a\nb\\\x7f"), "a\\012b\\134\\177") == 0);
    CHECK(strcmp(SHOW("\xc0\xaf|\xed\xa0\x80|\xff|\xc3"), "\\300\\257|\\355\\240\\200|\\377|\\303") == 0);
    char name[1000];
    memset(name, '\n', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    const char *shown = SHOW(name);
    CHECK(strlen(shown) < SHOWN_SIZE && strcmp(shown + strlen(shown) - 3, "...") == 0);
}

static int print_stat(const char *path, uint64_t flags, struct failure *failure) {
    struct buffer request = {0}, reply = {0};
    put_string(&request, TAG_PATH, path);
    put_number(&request, TAG_FLAGS, flags);
    struct fields fields = {.rest = {request.data, request.length}};
    int code = call_stat(&fields, &reply, failure);
    struct fields answer = {.rest = {reply.data, reply.length}};
    struct bytes value;
    uint16_t tag;
    uint64_t number;
    while (fields_next(&answer, &tag, &value)) {
        if (tag == TAG_LINK)
            printf("%d %.*s\n", tag, (int)value.length, (const char *)value.data);
        else if (value_number(value, &number))
            printf("%d %llu\n", tag, (unsigned long long)number);
    }
    buffer_free(&request);
    buffer_free(&reply);
    return code;
}

int main(int argc, char **argv) {
    struct failure failure = {0};
    struct tree_options options = {0};
    int code = 0;
    if (argc < 2) {
        test_header_numbers();
        test_decimals();
        test_pax_records();
        test_xattr_keys();
        test_shown_names();
        return 0;
    }
    if (strcmp(argv[1], "extract") == 0 && (argc == 3 || argc == 5)) {
        options.set_owner = argc == 5;
        options.uid = argc == 5 ? (uid_t)atoi(argv[3]) : 0;
        options.gid = argc == 5 ? (gid_t)atoi(argv[4]) : 0;
        code = tar_extract(0, argv[2], &options, &failure);
    } else if (argc == 4 && strcmp(argv[1], "create") == 0) {
        options.flags = (uint64_t)atoi(argv[3]);
        code = tar_create(1, argv[2], &options, &failure);
    } else if (argc == 4 && strcmp(argv[1], "stat") == 0) {
        code = print_stat(argv[2], (uint64_t)atoi(argv[3]), &failure);
    } else {
        fprintf(stderr, "usage: see the source\n");
        return 2;
    }
    if (code)
        fprintf(stderr, "%d %s\n", failure.code, failure.message);
    return code ? 1 : 0;
}
