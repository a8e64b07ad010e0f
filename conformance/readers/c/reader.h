/*
 * A strict reader of flashfmt 1.0 in C99, written from SPEC.md alone.
 *
 *   support.c       memory, failures, checksums, strict JSON          (SPEC sections 5 and 13)
 *   container.c     a file or a directory becomes keys with bytes     (4, 17)
 *   manifest.c      the manifest and its defaults                     (7, 13, 14, 17, 18)
 *   arrays.c        array documents and their chunks                  (6, 9 to 12, 17)
 *   model.c         the hierarchy, and what the manifest calls for    (6, 8)
 *   flash_reader.c  requests, decoding, verification, answers         (9 to 13, 15)
 *
 * Every check names the rule it enforces. A broken rule ends the request by a jump out of it (`broken`), so code
 * behind a `require` may rely on it.
 */
#ifndef FLASH_READER_H
#define FLASH_READER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* ---- failures ---- */

typedef enum { FINISHED = 0, GAVE_UP = 1, BROKEN = 65 } Outcome; /* also the exit codes */

/* Run `work`. BROKEN: `*why` is the id of a rule; GAVE_UP: a message. Frees all that `work` took. */
Outcome attempt(void (*work)(void *), void *argument, const char **why);
void broken(const char *rule) __attribute__((noreturn));
void give_up(const char *message) __attribute__((noreturn));
static inline void require(bool holds, const char *rule)
{
    if (!holds)
        broken(rule);
}

/* ---- memory: a stack of blocks and mappings ---- */

void *take(size_t nbytes); /* zeroed; gives up where there is no memory */
/* Read-only; the file must be regular and have exactly `nbytes`. Map only files that nobody truncates meanwhile. */
const uint8_t *map_file(const char *path, uint64_t nbytes, bool follow_link);
void *mark(void);
void release(void *mark); /* frees what was taken or mapped since */

/* ---- checksums ---- */

typedef struct {
    uint32_t state[8];
    uint64_t nbytes;
    uint8_t block[64];
} Sha256;

uint32_t crc32(const uint8_t *data, uint64_t nbytes);
uint32_t crc32c(uint32_t crc, const uint8_t *data, uint64_t nbytes); /* begin with 0; feeds on */
void sha256_begin(Sha256 *sha);
void sha256_feed(Sha256 *sha, const uint8_t *data, uint64_t nbytes);
void sha256_end(Sha256 *sha, char hex[65]);
bool same_crc(uint32_t stated, uint32_t computed);

/* ---- JSON ---- */

typedef enum { NOTHING, BOOLEAN, INTEGER, REAL, TEXT, LIST, OBJECT } JsonType;

typedef struct Json Json;
struct Json {
    JsonType type;
    bool negative;      /* INTEGER */
    uint64_t magnitude; /* INTEGER; of BOOLEAN 0 or 1 */
    double real;        /* INTEGER and REAL */
    const char *text;   /* TEXT: UTF-8, may hold NUL; one NUL stands behind it */
    size_t nbytes;      /* TEXT */
    Json *first;        /* LIST, OBJECT */
    size_t n;           /* LIST, OBJECT */
    Json *next;         /* in the list or object it belongs to */
    const char *key;    /* in the object it belongs to; like `text` */
    size_t key_nbytes;
};

#define MAX_DOCUMENT_BYTES ((size_t)1 << 20)

Json *parse_json(const uint8_t *data, size_t nbytes); /* a document: breaks FF-JSON and FF-LIM-4 */
const Json *member(const Json *object, const char *key); /* NULL where it is not there, or `object` is none */
bool is_text(const Json *value, const char *text);
bool is_integer(const Json *value, uint64_t least, uint64_t most);
bool only_members(const Json *value, const char *keys); /* an object without others than these, separated by spaces */
void print_json(FILE *out, const Json *value); /* REAL: binary64 as 16 hexadecimal digits */
void print_text(FILE *out, const char *text, size_t nbytes);

/* ---- containers ---- */

typedef struct {
    const char *key;
    uint64_t offset; /* of the bytes, in the single file; 0 in a directory */
    uint64_t nbytes;
    uint32_t crc32; /* single file */
    bool is_document, is_group, is_chunk;
} Entry;

typedef struct {
    const char *path;
    bool is_directory;
    const uint8_t *bytes; /* single file */
    uint64_t nbytes;
    Entry *entries; /* by key, bytewise */
    size_t n_entries;
} Container;

void open_container(Container *container, const char *path);
Entry *find_entry(const Container *container, const char *key);
const uint8_t *entry_bytes(const Container *container, const Entry *entry); /* in a directory: until `release` */
uint64_t little_endian(const uint8_t *at, int n_bytes);
bool is_aligned(uint64_t value, uint64_t alignment);

/* ---- models ---- */

typedef enum { F32, F16, BF16, Q8, Q4, U8, U32, N_ENCODINGS } Encoding;
typedef enum { TENSOR, EMBEDDED_FILE, BUNDLES } Kind;

typedef struct {
    const char *name, *data_type;
    unsigned item_nbytes;
    bool holds_weights;
} EncodingInfo;

extern const EncodingInfo ENCODINGS[N_ENCODINGS];
uint64_t round_up(uint64_t value, uint64_t multiple);
bool is_packed(Encoding encoding); /* q8, q4 */
uint64_t encoded_nbytes(Encoding encoding, uint64_t n_weights);

#define MAX_DIMENSIONS 8

typedef struct {
    size_t n;
    uint64_t of[MAX_DIMENSIONS];
} Shape;

typedef struct {
    const char *name; /* of the node */
    Kind kind;
    Entry *chunk;
    uint32_t crc32c;
    Shape storage;
    Encoding encoding;                 /* TENSOR, BUNDLES */
    Shape logical;                     /* TENSOR */
    const char *codec;                 /* TENSOR: raw, zstd, blosc */
    char filename[256], sha256[65];    /* EMBEDDED_FILE */
    uint64_t n_neurons, d_model, n_parts, part_nbytes, row_nbytes, stride, alignment; /* BUNDLES */
    bool is_called_for, is_asked_for;  /* by the manifest; by a request */
} Array;

typedef struct {
    Container container;
    const Json *manifest; /* with all defaults filled in, and without unknown fields */
    const Json *decoder;
    Array *arrays; /* by name */
    size_t n_arrays;
    uint64_t n_layers;
} Model;

bool is_choice(const Json *text, const char *choice, size_t n_choice); /* one of the words between the bars of `choice` */
bool is_hex(const Json *value, size_t n); /* a text of n lower-case hexadecimal digits */
bool is_name(const Json *value);
bool is_null(const Json *object, const char *key);
bool same_shape(const Shape *a, const Shape *b);

/* Check the manifest against its schema and the documents' checksum; sets the fields of `model` that come from it. */
void read_manifest(Model *model, const Json *manifest, const uint8_t *root, size_t n_root);
/* Fill in `array`, whose name is set, from its document, and find its chunk. */
void read_array(const Model *model, Array *array, const Json *document);
void open_model(Model *model, const char *path);
Array *find_array(const Model *model, const char *name);
Array *bundles_of(const Model *model, uint64_t layer);
const char *part_name(const Array *bundles, size_t part);
uint64_t integer_of(const Json *object, const char *key);
bool boolean_of(const Json *object, const char *key);

/* ---- requests ---- */

/* Read one request and write the answer; returns the exit code. */
int answer(const uint8_t *request, size_t nbytes, FILE *out);

#endif
