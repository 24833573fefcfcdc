/* Tar streams: what reading, extracting and making them share.
 *
 * Formats: POSIX.1-2017 pax utility (ustar, pax extended headers) and the GNU tar manual ("Basic Tar Format", "Storing
 * Sparse Files"). Internal functions return 0 or the errno that fail() has put into `failure`.
 */
#ifndef BANGER_TAR_H
#define BANGER_TAR_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>

#include "agent.h"

enum {
    TAR_BLOCK = 512,
    TAR_BUFFER = 256 * 1024,        /* bytes moved per system call */
    MAX_PAX_HEADER = 1024 * 1024,   /* bytes of records for one member */
    MAX_PAX_GLOBAL = 64 * 1024,     /* bytes of global records, which every member goes through */
    MAX_EXTENTS = 1024 * 1024,      /* pieces of one sparse file */
    SHOWN_SIZE = 224,               /* a name as it stands in a message */
};

struct tar_header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, link[100];
    char magic[6], version[2], uname[32], gname[32], major[8], minor[8];
    union {
        char prefix[155]; /* ustar */
        struct {          /* GNU: magic is "ustar " */
            char unused[41], extents[4][2][12], extended, real_size[12];
        } gnu;
        char rest[167];
    };
};

/* Data of a sparse file, in bytes; what lies between the extents is a hole. */
struct extent {
    uint64_t offset, length;
};

struct extents {
    struct extent *list;
    size_t count, capacity;
};

/* tar_format.c ---------------------------------------------------------------------------------------------------- */

/* `name` for a message: printable UTF-8, anything else escaped in octal, cut when long. */
const char *show_name(const char *name, char shown[SHOWN_SIZE]);
#define SHOW(name) show_name(name, (char[SHOWN_SIZE]){0})

/* Octal digits or GNU's base-256 of a header field; false when it is neither or does not fit. */
bool header_number(const char *field, size_t size, int64_t *number);
/* Sum of the header's bytes with its checksum field taken as spaces. */
unsigned header_checksum(const struct tar_header *header);
bool header_intact(const struct tar_header *header);
bool is_zero(const uint8_t *data, size_t length);

/* Only decimal digits that fit; for pax records. */
bool decimal_number(struct bytes text, uint64_t *number);
/* [-]seconds[.fraction] */
bool decimal_time(struct bytes text, struct timespec *time);

/* Takes the next "LENGTH KEY=VALUE\n" from `rest`; false at the end, and at a malformed record, with `bad` set. */
bool pax_next(struct bytes *rest, struct bytes *key, struct bytes *value, bool *bad);
void pax_append(struct buffer *records, const char *key, const void *value, size_t length);
bool bytes_equal(struct bytes bytes, const char *text);

/* The name of an extended attribute as pax key and back: GNU tar writes "%3D" for '=' and "%25" for '%'. `out` has
 * XATTR_NAME_MAX * 3 + sizeof XATTR_KEY bytes; false when the key is none or too long. */
#define XATTR_KEY "SCHILY.xattr."
enum { XATTR_KEY_SIZE = 255 * 3 + sizeof XATTR_KEY };
void xattr_to_key(const char *name, char out[XATTR_KEY_SIZE]);
bool xattr_from_key(struct bytes key, char out[XATTR_KEY_SIZE]);

bool extents_add(struct extents *extents, uint64_t offset, uint64_t length);

/* tar_read.c ------------------------------------------------------------------------------------------------------ */

struct member {
    char type; /* '0' file, '1' hard link, '2' symbolic link, '3' and '4' devices, '5' directory, '6' fifo */
    char name[PATH_MAX], link[PATH_MAX];
    mode_t mode;
    uid_t uid;
    gid_t gid;
    struct timespec mtime;
    dev_t device;
    uint64_t size;     /* of the file, holes included */
    uint64_t stored;   /* bytes of data in the stream that have not been taken yet */
    uint64_t padding;  /* bytes after them up to the next header */
    struct extents extents;
};

struct tar_reader {
    int in;
    uint8_t *data; /* TAR_BUFFER bytes, of which [start, end) are unread */
    size_t start, end;
    struct buffer records, global; /* pax records of this member and of all */
    struct member member;
    struct failure *failure;
};

int reader_open(struct tar_reader *reader, int in, struct failure *failure);
void reader_close(struct tar_reader *reader);
/* Reads up to the next member; *end is true when there is none. What is left of the previous one is skipped. */
int reader_next(struct tar_reader *reader, bool *end);
/* The member's next bytes of data, at least `least` (at most TAR_BUFFER) of them; stored must not be smaller. */
int reader_data(struct tar_reader *reader, size_t least, struct bytes *data);
void reader_take(struct tar_reader *reader, size_t length);
/* Reads and drops everything up to the end of the stream, so that its writer is not stopped by a closed pipe. */
int reader_drain(struct tar_reader *reader);

/* tar_write.c ----------------------------------------------------------------------------------------------------- */

struct tar_writer {
    int out;
    uint8_t *data; /* TAR_BUFFER bytes, of which `used` have to be written */
    size_t used;
    bool no_sendfile;
    struct failure *failure;
    struct buffer records, map;
    struct extents extents;
    char name[PATH_MAX + 1]; /* of the member; room for the slash of a directory */
};

int writer_open(struct tar_writer *writer, int out, struct failure *failure);
void writer_close(struct tar_writer *writer);
/* Fails with errno: "cannot WHAT NAME: ..." */
int writer_failed(struct tar_writer *writer, const char *what);
/* Fill a field of the header, or add the record `pax` when that cannot hold the value. */
void writer_octal(struct tar_writer *writer, char *field, size_t size, uint64_t number, const char *pax);
void writer_name(struct tar_writer *writer, char *field, size_t size, const char *name, const char *pax);
void writer_time(struct tar_writer *writer, struct tar_header *header, struct timespec time);
/* Writes the records, if there are any, and the header. */
int writer_member(struct tar_writer *writer, struct tar_header *header);
/* The same for a file, and its data, of which only what is no hole. */
int writer_file(struct tar_writer *writer, struct tar_header *header, int fd, const struct stat *status);
/* Ends the stream. */
int writer_finish(struct tar_writer *writer);

#endif
