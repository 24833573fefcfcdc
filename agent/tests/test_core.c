/* Unit tests of the agent's core: CRC, fields, the frame parser and its resynchronisation, rings, accounts. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../frame.h"
#include "../ring.h"
#include "../wire.h"

#define CHECK(condition) check(condition, #condition, __LINE__)

static void check(bool good, const char *text, int line) {
    if (!good) {
        fprintf(stderr, "test_core.c:%d: not true: %s\n", line, text);
        exit(1);
    }
}

static struct bytes text_bytes(const char *text) { return (struct bytes){(const uint8_t *)text, strlen(text)}; }

static bool same(struct bytes value, const char *text) {
    return value.length == strlen(text) && memcmp(value.data, text, value.length) == 0;
}

/* The check value of CRC-32/ISO-HDLC in every catalogue of CRCs. */
static void test_crc(void) {
    CHECK(crc32((const uint8_t *)"123456789", 9) == 0xcbf43926);
    CHECK(crc32(NULL, 0) == 0);
}

/* Fields ------------------------------------------------------------------------------------------------------ */

static void test_fields(void) {
    struct buffer buffer = {0};
    uint16_t tag;
    struct bytes value;
    uint64_t number;
    put_string(&buffer, TAG_ARG, "ls");
    put_number(&buffer, TAG_PORT, 0x1122334455667788);
    put_string(&buffer, TAG_CWD, "");
    CHECK(!buffer.failed && buffer.length == 3 * 6 + 2 + 8);
    struct fields fields = {{buffer.data, buffer.length}, false};
    CHECK(fields_next(&fields, &tag, &value) && tag == TAG_ARG && same(value, "ls") && !value_number(value, &number));
    CHECK(fields_next(&fields, &tag, &value) && tag == TAG_PORT);
    CHECK(value_number(value, &number) && number == 0x1122334455667788);
    CHECK(fields_next(&fields, &tag, &value) && tag == TAG_CWD && value.length == 0);
    CHECK(!fields_next(&fields, &tag, &value) && !fields.bad);
    /* Cut anywhere but between two fields, the list is bad. */
    for (size_t length = 0; length < buffer.length; length++) {
        fields = (struct fields){{buffer.data, length}, false};
        while (fields_next(&fields, &tag, &value))
            CHECK(value.data + value.length <= buffer.data + length);
        CHECK(fields.bad == (length != 0 && length != 8 && length != 22));
    }
    buffer_free(&buffer);
}

static void test_huge_field(void) {
    static const uint8_t data[] = {1, 0, 0xff, 0xff, 0xff, 0xff, 'x'};
    struct fields fields = {{data, sizeof data}, false};
    uint16_t tag;
    struct bytes value;
    CHECK(!fields_next(&fields, &tag, &value) && fields.bad);
}

static void test_strings(void) {
    char *text = value_string(text_bytes("abc"), 3);
    CHECK(text != NULL && strcmp(text, "abc") == 0);
    free(text);
    CHECK(value_string(text_bytes("abc"), 2) == NULL);
    CHECK(value_string((struct bytes){(const uint8_t *)"a\0b", 3}, 10) == NULL);
    text = value_string((struct bytes){NULL, 0}, 0);
    CHECK(text != NULL && *text == 0);
    free(text);
}

static void test_buffer(void) {
    struct buffer buffer = {0};
    for (int i = 0; i < 10000; i++)
        buffer_append(&buffer, "0123456789", 10);
    CHECK(buffer.length == 100000 && memcmp(buffer.data + 99990, "0123456789", 10) == 0);
    buffer_append(&buffer, "x", SIZE_MAX / 2);
    CHECK(buffer.failed && buffer.length == 100000);
    buffer_append(&buffer, "x", 1);
    CHECK(buffer.length == 100000);
    buffer_free(&buffer);
}

static void test_failure(void) {
    struct failure failure;
    CHECK(fail(&failure, ENOENT, "%0600d", 7) == ENOENT && failure.code == ENOENT);
    CHECK(strlen(failure.message) == sizeof failure.message - 1);
}

/* Frames ------------------------------------------------------------------------------------------------------ */

static struct parser parser;

static void begin_parser(bool synced) {
    parser.start = parser.end = 0;
    parser.synced = synced;
}

static void put_frame(struct buffer *stream, uint8_t type, uint32_t channel, const void *payload, uint32_t length) {
    uint8_t header[HEADER_SIZE];
    frame_header(header, type, 0, channel, length);
    buffer_append(stream, header, sizeof header);
    buffer_append(stream, payload, length);
    buffer_append(stream, header + 12, TRAILER_SIZE);
}

static void put_hello(struct buffer *stream) {
    static const uint8_t payload[HELLO_SIZE] = {42};
    put_frame(stream, FRAME_HELLO, 0, payload, sizeof payload);
}

static void put_zeros(struct buffer *stream, size_t count) {
    static const uint8_t zeros[MAX_FRAME];
    buffer_append(stream, zeros, count);
}

struct seen {
    char types[64]; /* 'A' + type of each frame, '!' where the session broke */
    size_t payload_bytes;
};

/* Feeds the stream in pieces of `step` bytes. */
static struct seen parse(struct bytes stream, size_t step, bool synced) {
    struct seen seen = {{0}, 0};
    struct frame frame;
    size_t count = 0;
    begin_parser(synced);
    while (stream.length > 0) {
        struct bytes space = parser_space(&parser);
        CHECK(space.length >= MAX_FRAME);
        size_t length = stream.length < step ? stream.length : step;
        length = length < space.length ? length : space.length;
        memcpy((uint8_t *)space.data, stream.data, length);
        parser_filled(&parser, length);
        stream.data += length;
        stream.length -= length;
        enum parsed parsed;
        while ((parsed = parser_next(&parser, &frame)) != PARSED_NOTHING) {
            CHECK(count + 1 < sizeof seen.types);
            seen.types[count++] = parsed == PARSED_FRAME ? (char)('A' + frame.type) : '!';
            seen.payload_bytes += parsed == PARSED_FRAME ? frame.payload.length : 0;
        }
    }
    return seen;
}

static struct bytes all(const struct buffer *buffer) { return (struct bytes){buffer->data, buffer->length}; }

/* HELLO is 'B', DATA 'F', END 'G'. */
static void test_every_split(void) {
    struct buffer stream = {0};
    put_zeros(&stream, 100);
    put_hello(&stream);
    put_frame(&stream, FRAME_DATA, 5, "hello", 5);
    put_zeros(&stream, 3);
    put_frame(&stream, FRAME_END, 5, NULL, 0);
    for (size_t step = 1; step <= stream.length; step++) {
        struct seen seen = parse(all(&stream), step, false);
        CHECK(strcmp(seen.types, "BFG") == 0 && seen.payload_bytes == HELLO_SIZE + 5);
    }
    buffer_free(&stream);
}

static void test_largest_frames(void) {
    static uint8_t payload[MAX_PAYLOAD];
    struct buffer stream = {0};
    put_hello(&stream);
    for (int i = 0; i < 20; i++)
        put_frame(&stream, FRAME_DATA, 5, payload, sizeof payload);
    for (size_t step = 4096; step < 300000; step += 49999) {
        struct seen seen = parse(all(&stream), step, false);
        CHECK(strcmp(seen.types, "BFFFFFFFFFFFFFFFFFFFF") == 0);
        CHECK(seen.payload_bytes == HELLO_SIZE + 20 * sizeof payload);
    }
    buffer_free(&stream);
}

/* A frame cut anywhere, completed by the zeros of the next host, is never taken for good, and its HELLO is found. */
static void test_cut_and_zeros(void) {
    uint8_t payload[200];
    struct buffer whole = {0};
    memset(payload, 7, sizeof payload);
    put_frame(&whole, FRAME_DATA, 5, payload, sizeof payload);
    for (size_t cut = 1; cut < whole.length; cut++) {
        struct buffer stream = {0};
        buffer_append(&stream, whole.data, cut);
        put_zeros(&stream, MAX_FRAME);
        put_hello(&stream);
        put_frame(&stream, FRAME_END, 5, NULL, 0);
        CHECK(strcmp(parse(all(&stream), 4096, true).types, "!BG") == 0);
        buffer_free(&stream);
    }
    buffer_free(&whole);
}

/* Any flipped byte of the header or trailer ends the session; the HELLO behind it begins the next. */
static void test_damage(void) {
    struct buffer stream = {0};
    put_frame(&stream, FRAME_DATA, 5, "hello", 5);
    size_t frame = stream.length;
    put_zeros(&stream, MAX_FRAME);
    put_hello(&stream);
    for (size_t at = 0; at < frame; at++) {
        if (at >= HEADER_SIZE && at < HEADER_SIZE + 5)
            continue;
        stream.data[at] ^= 0x40;
        CHECK(strcmp(parse(all(&stream), 1000, true).types, "!B") == 0);
        stream.data[at] ^= 0x40;
    }
    CHECK(strcmp(parse(all(&stream), 1000, true).types, "FB") == 0);
    buffer_free(&stream);
}

static void test_bad_headers(void) {
    static const struct {
        uint8_t type;
        uint32_t length;
    } bad[] = {{0, 0}, {FRAME_PART + 1, 0}, {FRAME_DATA, MAX_PAYLOAD + 1}, {FRAME_DATA, UINT32_MAX}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        uint8_t header[HEADER_SIZE];
        frame_header(header, bad[i].type, 0, 5, bad[i].length);
        CHECK(strcmp(parse((struct bytes){header, sizeof header}, 16, true).types, "!") == 0);
    }
}

/* A HELLO inside of what looked like payload, and behind another one that is damaged. */
static void test_hello_inside(void) {
    uint8_t header[HEADER_SIZE];
    struct buffer stream = {0};
    frame_header(header, FRAME_DATA, 0, 5, 300);
    buffer_append(&stream, header, sizeof header);
    put_hello(&stream);
    stream.data[stream.length - 1] ^= 1;
    put_hello(&stream);
    put_frame(&stream, FRAME_END, 5, NULL, 0);
    buffer_append(&stream, "noise", 5);
    put_zeros(&stream, 300);
    CHECK(strncmp(parse(all(&stream), 64, true).types, "!BG!", 4) == 0);
    buffer_free(&stream);
}

static void test_nothing_before_hello(void) {
    struct buffer stream = {0};
    put_frame(&stream, FRAME_END, 5, NULL, 0);
    buffer_append(&stream, "BGBGBGBG", 8);
    put_hello(&stream);
    for (size_t step = 1; step <= stream.length; step++)
        CHECK(strcmp(parse(all(&stream), step, false).types, "B") == 0);
    buffer_free(&stream);
}

/* Rings ------------------------------------------------------------------------------------------------------- */

/* Bytes come out as they went in, around the end and through growth. */
static void test_ring(void) {
    enum { LIMIT = 64 * 1024 };
    struct ring ring = {0};
    uint8_t next_in = 0, next_out = 0, piece[1000];
    for (size_t round = 0; round < 5000; round++) {
        size_t in = round * 7919 % sizeof piece, out = round * 104729 % sizeof piece;
        for (size_t i = 0; i < in; i++)
            piece[i] = (uint8_t)(next_in + i);
        if (ring_append(&ring, piece, in, LIMIT))
            next_in = (uint8_t)(next_in + in);
        else
            CHECK(ring.length + in > LIMIT);
        out = out < ring.length ? out : ring.length;
        struct iovec parts[2];
        if (out == 0)
            continue;
        ring_parts(&ring, 0, out, parts);
        CHECK(parts[0].iov_len + parts[1].iov_len == out);
        for (int part = 0; part < 2; part++)
            for (size_t i = 0; i < parts[part].iov_len; i++)
                CHECK(((uint8_t *)parts[part].iov_base)[i] == next_out++);
        ring_consume(&ring, out);
        CHECK(ring.length <= ring.capacity && ring.capacity <= LIMIT);
    }
    free(ring.data);
}

/* Accounts ---------------------------------------------------------------------------------------------------- */

static void write_file(const char *path, const char *text) {
    FILE *file = fopen(path, "w");
    CHECK(file != NULL && fputs(text, file) >= 0 && fclose(file) == 0);
}

static struct account found(const char *user) {
    struct account account;
    struct failure failure = {0};
    int code = account_find(user, &account, &failure);
    if (code != 0)
        fprintf(stderr, "%s: %s\n", user, failure.message);
    CHECK(code == 0);
    return account;
}

static int missing(const char *user) {
    struct account account;
    struct failure failure = {0};
    int code = account_find(user, &account, &failure);
    CHECK(code == failure.code && (code == 0 || failure.message[0] != 0));
    return code;
}

static void check_accounts(void) {
    struct account account = found("ann");
    CHECK(account.uid == 1000 && account.gid == 1001 && strcmp(account.home, "/home/ann") == 0);
    CHECK(strcmp(account.shell, "/bin/zsh") == 0 && strcmp(account.name, "ann") == 0);
    CHECK(account.group_count == 3 && account.groups[0] == 1001 && account.groups[1] == 27 && account.groups[2] == 44);
    account = found("1000");
    CHECK(account.uid == 1000 && strcmp(account.name, "ann") == 0 && account.group_count == 3);
    account = found("ann:video");
    CHECK(account.uid == 1000 && account.gid == 44 && account.group_count == 1 && account.groups[0] == 44);
    account = found("77:88");
    CHECK(account.uid == 77 && account.gid == 88 && strcmp(account.home, "/") == 0 &&
          strcmp(account.shell, "/bin/sh") == 0);
    /* Digits are an id, whatever names there are. */
    account = found("2000");
    CHECK(account.uid == 2000 && strcmp(account.home, "/other") == 0);
    account = found("ann:44");
    CHECK(account.gid == 44);
    CHECK(missing("bob") == ESRCH && missing("ann:nobodies") == ESRCH && missing("bad") == ESRCH);
    account = found(":video");
    CHECK(account.uid == 0 && account.gid == 44 && account.group_count == 1);
    account = found("ann:");
    CHECK(account.uid == 1000 && account.gid == 1001 && account.group_count == 3);
    CHECK(missing("") == EINVAL && missing(":") == EINVAL && missing("4294967295") == ESRCH);
    CHECK(missing("99999999999999999999") == ESRCH && missing("-1") == ESRCH);
}

static bool is(const char *user, uid_t uid, gid_t gid, const char *home, const char *shell) {
    struct account account = found(user);
    return account.uid == uid && account.gid == gid && strcmp(account.home, home) == 0 &&
           strcmp(account.shell, shell) == 0;
}

/* What images have in their databases that were not made by useradd. */
static void check_odd_databases(void) {
    write_file("etc/passwd", "+::::::\n-mallory\n  \n\troot:x:0:0::/root:/bin/ash\r\n# x:x:1:1\nfour:x:1000:1000\r\n"
                             "five:x:1001:1001:Five\nthree:x:1002\nsix:x:1003:1003::/six\none\nempty:x:::::\n"
                             ":x:7:7::/:/bin/sh\nlarge:x:4294967294:4294967294::/:/bin/sh\n"
                             "larger:x:4294967296:1::/:/bin/sh\n");
    FILE *group = fopen("etc/group", "w");
    CHECK(group != NULL && fputs("+\nfour:x:1000\nthin\nmany:x:30:", group) >= 0);
    for (int i = 0; i < 10000; i++)
        fprintf(group, "user%d,", i);
    fputs("four\r\nlast:x:31:four", group);
    for (int i = 0; i < 100; i++)
        fprintf(group, "\ng%d:x:%d:six", i, 2000 + i);
    CHECK(fclose(group) == 0);
    CHECK(is("root", 0, 0, "/root", "/bin/ash") && is("0", 0, 0, "/root", "/bin/ash"));
    CHECK(is("four", 1000, 1000, "/", "/bin/sh") && is("1000", 1000, 1000, "/", "/bin/sh"));
    CHECK(is("five", 1001, 1001, "/", "/bin/sh") && is("three", 1002, 0, "/", "/bin/sh"));
    CHECK(is("six", 1003, 1003, "/six", "/bin/sh") && is("one", 0, 0, "/", "/bin/sh"));
    CHECK(is("empty", 0, 0, "/", "/bin/sh") && is("1234", 1234, 0, "/", "/bin/sh"));
    CHECK(is("large", 4294967294, 4294967294, "/", "/bin/sh") && is("1234:many", 1234, 30, "/", "/bin/sh"));
    CHECK(is("five:four", 1001, 1000, "/", "/bin/sh") && is("five:thin", 1001, 0, "/", "/bin/sh"));
    struct account account = found("1000");
    CHECK(account.group_count == 3 && account.groups[1] == 30 && account.groups[2] == 31);
    CHECK(found("six").group_count == 101);
}

/* In a directory that becomes the root of a child process, as the paths are fixed. */
static void test_accounts(void) {
    char root[] = "/tmp/banger-test-XXXXXX";
    CHECK(mkdtemp(root) != NULL && chdir(root) == 0 && mkdir("etc", 0700) == 0);
    pid_t child = fork();
    if (child == 0) {
        CHECK(chroot(".") == 0);
        /* An image without a passwd still has root. */
        CHECK(found("root").uid == 0 && strcmp(found("root").home, "/root") == 0 && missing("ann") == ESRCH);
        write_file("etc/passwd", "root:x:0:0:root:/root:/bin/bash\n# comment\nshort:x:7:7\n\nbad:x:x:1::/:/bin/sh\n"
                                 "ann:x:1000:1001:Ann:/home/ann:/bin/zsh\nother:x:2000:2000::/other:/bin/sh\n"
                                 "2000:x:5:5:::\nlast:x:9:9::/:/bin/false");
        write_file("etc/group", "root:x:0:\nsudo:x:27:bob,ann\nvideo:x:44:ann\nann:x:1001:ann\nannex:x:45:anna,nn\n");
        check_accounts();
        CHECK(found("last").uid == 9 && found("short").gid == 7);
        check_odd_databases();
        /* A fifo must not block, nor be believed. */
        CHECK(unlink("etc/passwd") == 0 && mkfifo("etc/passwd", 0600) == 0);
        CHECK(missing("ann") == ESRCH && found("0").uid == 0);
        CHECK(unlink("etc/passwd") == 0 && unlink("etc/group") == 0);
        _exit(0); /* the leak check at exit needs /proc */
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(rmdir("etc") == 0 && chdir("/") == 0 && rmdir(root) == 0);
    CHECK(status == 0);
}

int main(void) {
    test_crc();
    test_fields();
    test_huge_field();
    test_strings();
    test_buffer();
    test_failure();
    test_every_split();
    test_largest_frames();
    test_cut_and_zeros();
    test_damage();
    test_bad_headers();
    test_hello_inside();
    test_nothing_before_hello();
    test_ring();
    if (geteuid() == 0)
        test_accounts();
    else
        printf("skipped: accounts need chroot, which needs root\n");
    return 0;
}
