/* Memory, failures, checksums and strict JSON. Knows nothing of models. */
#include "reader.h"

#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- failures ---- */

static jmp_buf way_out;
static const char *reason;

Outcome attempt(void (*work)(void *), void *argument, const char **why)
{
    void *before = mark();
    Outcome outcome;
    switch (setjmp(way_out)) {
    case 0:
        work(argument);
        outcome = FINISHED;
        break;
    case BROKEN:
        outcome = BROKEN;
        break;
    default:
        outcome = GAVE_UP;
    }
    *why = reason;
    release(before);
    return outcome;
}

void broken(const char *rule)
{
    reason = rule;
    longjmp(way_out, BROKEN);
}

void give_up(const char *message)
{
    reason = message;
    longjmp(way_out, GAVE_UP);
}

/* ---- memory ---- */

typedef union Block Block;
union Block {
    struct {
        Block *previous;
        void *mapping; /* NULL: the memory follows this header */
        size_t nbytes;
    } is;
    long double aligned;
};

static Block *last_block;

void *take(size_t nbytes)
{
    Block *block = nbytes < SIZE_MAX - sizeof *block ? calloc(1, sizeof *block + nbytes) : NULL;
    if (block == NULL)
        give_up("out of memory");
    block->is.previous = last_block;
    last_block = block;
    return block + 1;
}

const uint8_t *map_file(const char *path, uint64_t nbytes, bool follow_link)
{
    if (nbytes == 0)
        return (const uint8_t *)"";
    void *before = mark();
    take(0);
    Block *block = last_block;
    struct stat status;
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | (follow_link ? 0 : O_NOFOLLOW));
    if (file < 0)
        give_up("cannot open a file");
    void *mapping = MAP_FAILED;
    if (fstat(file, &status) == 0 && S_ISREG(status.st_mode) && (uint64_t)status.st_size == nbytes && nbytes <= SIZE_MAX)
        mapping = mmap(NULL, (size_t)nbytes, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (mapping == MAP_FAILED) {
        release(before);
        give_up("cannot map a file");
    }
    block->is.mapping = mapping;
    block->is.nbytes = (size_t)nbytes;
    return mapping;
}

void *mark(void)
{
    return last_block;
}

void release(void *before)
{
    while (last_block != before) {
        Block *block = last_block;
        last_block = block->is.previous;
        if (block->is.mapping != NULL)
            munmap(block->is.mapping, block->is.nbytes);
        free(block);
    }
}

/* ---- checksums ---- */

static uint32_t crc_reflected(uint32_t table[256], uint32_t polynomial, uint32_t crc, const uint8_t *data, uint64_t nbytes)
{
    if (table[1] == 0) {
        for (uint32_t byte = 0; byte < 256; byte++) {
            uint32_t value = byte;
            for (int bit = 0; bit < 8; bit++)
                value = value >> 1 ^ (value & 1 ? polynomial : 0);
            table[byte] = value;
        }
    }
    crc = ~crc;
    for (uint64_t i = 0; i < nbytes; i++)
        crc = crc >> 8 ^ table[(crc ^ data[i]) & 255];
    return ~crc;
}

uint32_t crc32(const uint8_t *data, uint64_t nbytes)
{
    static uint32_t table[256];
    return crc_reflected(table, 0xedb88320, 0, data, nbytes);
}

uint32_t crc32c(uint32_t crc, const uint8_t *data, uint64_t nbytes)
{
    static uint32_t table[256];
    return crc_reflected(table, 0x82f63b78, crc, data, nbytes);
}

/* A fuzzer cannot guess checksums: in its build all are taken for right, so that it reaches the code behind them. */
bool same_crc(uint32_t stated, uint32_t computed)
{
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
    (void)stated, (void)computed;
    return true;
#else
    return stated == computed;
#endif
}

static uint32_t rotated(uint32_t word, int n)
{
    return word >> n | word << (32 - n);
}

static void sha256_block(uint32_t state[8], const uint8_t *block)
{
    static const uint32_t constants[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
    };
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 | (uint32_t)block[4 * i + 2] << 8 |
               block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t low = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t high = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + low + w[i - 7] + high;
    }
    memcpy(s, state, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t choice = (s[4] & s[5]) ^ (~s[4] & s[6]), majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
        uint32_t one = s[7] + (rotated(s[4], 6) ^ rotated(s[4], 11) ^ rotated(s[4], 25)) + choice + constants[i] + w[i];
        uint32_t two = (rotated(s[0], 2) ^ rotated(s[0], 13) ^ rotated(s[0], 22)) + majority;
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += one;
        s[0] = one + two;
    }
    for (int i = 0; i < 8; i++)
        state[i] += s[i];
}

void sha256_begin(Sha256 *sha)
{
    static const uint32_t initial[8] = {
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    };
    memcpy(sha->state, initial, sizeof initial);
    sha->nbytes = 0;
}

void sha256_feed(Sha256 *sha, const uint8_t *data, uint64_t nbytes)
{
    for (uint64_t i = 0; i < nbytes; i++) {
        sha->block[sha->nbytes++ % 64] = data[i];
        if (sha->nbytes % 64 == 0)
            sha256_block(sha->state, sha->block);
    }
}

void sha256_end(Sha256 *sha, char hex[65])
{
    uint64_t n_bits = 8 * sha->nbytes;
    uint8_t length[8];
    for (int i = 0; i < 8; i++)
        length[i] = (uint8_t)(n_bits >> (56 - 8 * i));
    sha256_feed(sha, (const uint8_t *)"\x80", 1);
    while (sha->nbytes % 64 != 56)
        sha256_feed(sha, (const uint8_t *)"", 1);
    sha256_feed(sha, length, 8);
    for (int i = 0; i < 8; i++)
        snprintf(hex + 8 * i, 9, "%08x", (unsigned)sha->state[i]);
}

/* ---- JSON ---- */

/* A document with a NUL behind it: no NUL is valid JSON, so the parser stops there at the latest. */
typedef struct {
    const char *at;
    int depth;
} Parser;

static Json *parse_value(Parser *parser);

/* Bytes of the UTF-8 sequence at `s`, or 0: overlong forms, surrogates and numbers above 10FFFF are none. */
static size_t utf8_nbytes(const uint8_t *s, size_t n_left)
{
    size_t n = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf5 ? 4 : 0;
    if (n > n_left)
        return 0;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f) || (s[0] == 0xf0 && s[1] < 0x90) ||
        (s[0] == 0xf4 && s[1] > 0x8f))
        return 0;
    return n;
}

static void skip_space(Parser *parser)
{
    parser->at += strspn(parser->at, " \t\n\r");
}

static bool skip(Parser *parser, char c)
{
    skip_space(parser);
    if (*parser->at != c)
        return false;
    parser->at++;
    return true;
}

static unsigned parse_hex4(Parser *parser)
{
    unsigned value = 0;
    for (int i = 0; i < 4; i++, parser->at++) {
        const char *digits = "0123456789abcdef", c = *parser->at;
        const char *digit = c == 0 ? NULL : strchr(digits, c >= 'A' && c <= 'F' ? c - 'A' + 'a' : c);
        require(digit != NULL, "FF-JSON-2");
        value = value << 4 | (unsigned)(digit - digits);
    }
    return value;
}

/* The code point of an escape \u, whose u is read already. */
static uint32_t parse_code_point(Parser *parser)
{
    uint32_t high = parse_hex4(parser);
    if (high < 0xd800 || high > 0xdfff)
        return high;
    require(high < 0xdc00 && parser->at[0] == '\\' && parser->at[1] == 'u', "FF-JSON-6");
    parser->at += 2;
    uint32_t low = parse_hex4(parser);
    require(low >= 0xdc00 && low <= 0xdfff, "FF-JSON-6");
    return 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
}

static char *put_utf8(char *to, uint32_t c)
{
    static const uint8_t leads[] = {0, 0, 0xc0, 0xe0, 0xf0};
    if (c < 0x80) {
        *to++ = (char)c;
        return to;
    }
    int n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    *to++ = (char)(leads[n] | c >> 6 * (n - 1));
    for (int i = n - 2; i >= 0; i--)
        *to++ = (char)(0x80 | (c >> 6 * i & 0x3f));
    return to;
}

static const char *parse_text(Parser *parser, size_t *nbytes)
{
    static const char escapes[] = "\"\\/bfnrt", escaped[] = "\"\\/\b\f\n\r\t";
    require(skip(parser, '"'), "FF-JSON-2");
    size_t n = 0;
    while (parser->at[n] != '"' && parser->at[n] != 0)
        n += parser->at[n] == '\\' && parser->at[n + 1] != 0 ? 2 : 1;
    char *text = take(n + 1), *to = text;
    while (*parser->at != '"') {
        uint8_t c = (uint8_t)*parser->at++;
        require(c >= 0x20, "FF-JSON-2");
        if (c != '\\') {
            *to++ = (char)c;
        } else if (*parser->at == 'u') {
            parser->at++;
            to = put_utf8(to, parse_code_point(parser));
        } else {
            const char *escape = *parser->at == 0 ? NULL : strchr(escapes, *parser->at);
            require(escape != NULL, "FF-JSON-2");
            *to++ = escaped[escape - escapes];
            parser->at++;
        }
    }
    parser->at++;
    *nbytes = (size_t)(to - text);
    return text;
}

static size_t n_digits(const char *at)
{
    return strspn(at, "0123456789");
}

static void parse_number(Parser *parser, Json *value)
{
    const char *start = parser->at;
    value->negative = *parser->at == '-';
    parser->at += value->negative;
    size_t n = n_digits(parser->at);
    require(n > 0 && (n == 1 || *parser->at != '0'), "FF-JSON-2");
    value->type = INTEGER;
    for (; n > 0; n--, parser->at++) {
        unsigned digit = (unsigned)(*parser->at - '0');
        if (value->type == INTEGER && value->magnitude <= (UINT64_MAX - digit) / 10)
            value->magnitude = 10 * value->magnitude + digit;
        else
            value->type = REAL; /* too large: an error, unless a fraction or an exponent follows */
    }
    bool overflows = value->type == REAL || (value->negative && value->magnitude > (uint64_t)1 << 63);
    value->type = INTEGER;
    if (*parser->at == '.') {
        value->type = REAL;
        n = n_digits(++parser->at);
        require(n > 0, "FF-JSON-2");
        parser->at += n;
    }
    if (*parser->at == 'e' || *parser->at == 'E') {
        value->type = REAL;
        parser->at++;
        parser->at += *parser->at == '+' || *parser->at == '-';
        n = n_digits(parser->at);
        require(n > 0, "FF-JSON-2");
        parser->at += n;
    }
    require(value->type == REAL || !overflows, "FF-JSON-4");
    value->real = strtod(start, NULL);
    require(isfinite(value->real), "FF-JSON-4");
}

static bool skip_word(Parser *parser, const char *word)
{
    size_t n = strlen(word);
    if (strncmp(parser->at, word, n) != 0)
        return false;
    parser->at += n;
    return true;
}

static int by_key(const void *a, const void *b)
{
    const Json *one = *(const Json *const *)a, *other = *(const Json *const *)b;
    size_t n = one->key_nbytes < other->key_nbytes ? one->key_nbytes : other->key_nbytes;
    int order = memcmp(one->key, other->key, n);
    return order != 0 ? order : (one->key_nbytes > other->key_nbytes) - (one->key_nbytes < other->key_nbytes);
}

static void require_distinct_keys(const Json *object)
{
    const Json **sorted = take((object->n + 1) * sizeof *sorted);
    size_t n = 0;
    for (const Json *value = object->first; value != NULL; value = value->next)
        sorted[n++] = value;
    qsort(sorted, n, sizeof *sorted, by_key);
    for (size_t i = 1; i < n; i++)
        require(by_key(&sorted[i - 1], &sorted[i]) != 0, "FF-JSON-3");
}

static void parse_members(Parser *parser, Json *value, char end)
{
    require(++parser->depth <= 32, "FF-LIM-4");
    Json **to = &value->first;
    if (!skip(parser, end)) {
        do {
            const char *key = NULL;
            size_t key_nbytes = 0;
            if (value->type == OBJECT) {
                key = parse_text(parser, &key_nbytes);
                require(skip(parser, ':'), "FF-JSON-2");
            }
            *to = parse_value(parser);
            (*to)->key = key;
            (*to)->key_nbytes = key_nbytes;
            to = &(*to)->next;
            value->n++;
        } while (skip(parser, ','));
        require(skip(parser, end), "FF-JSON-2");
    }
    if (value->type == OBJECT)
        require_distinct_keys(value);
    parser->depth--;
}

static Json *parse_value(Parser *parser)
{
    Json *value = take(sizeof *value);
    skip_space(parser);
    if (*parser->at == '{' || *parser->at == '[') {
        value->type = *parser->at++ == '{' ? OBJECT : LIST;
        parse_members(parser, value, value->type == OBJECT ? '}' : ']');
    } else if (*parser->at == '"') {
        value->type = TEXT;
        value->text = parse_text(parser, &value->nbytes);
    } else if (skip_word(parser, "true") || skip_word(parser, "false")) {
        value->type = BOOLEAN;
        value->magnitude = parser->at[-2] == 'u';
    } else if (skip_word(parser, "null")) {
        value->type = NOTHING;
    } else {
        bool is_finite = !skip_word(parser, "NaN") && !skip_word(parser, "Infinity") && !skip_word(parser, "-Infinity");
        require(is_finite, "FF-JSON-4");
        parse_number(parser, value);
    }
    return value;
}

Json *parse_json(const uint8_t *data, size_t nbytes)
{
    require(nbytes < 3 || memcmp(data, "\xef\xbb\xbf", 3) != 0, "FF-JSON-1");
    for (size_t i = 0, n; i < nbytes; i += n)
        require((n = utf8_nbytes(data + i, nbytes - i)) > 0, "FF-JSON-1");
    char *text = take(nbytes + 1);
    memcpy(text, data, nbytes);
    Parser parser = {text, 0};
    Json *value = parse_value(&parser);
    skip_space(&parser);
    require(parser.at == text + nbytes, "FF-JSON-2");
    require(value->type == OBJECT, "FF-JSON-5");
    return value;
}

const Json *member(const Json *object, const char *key)
{
    if (object == NULL || object->type != OBJECT)
        return NULL;
    const Json *value = object->first;
    while (value != NULL && !(value->key_nbytes == strlen(key) && memcmp(value->key, key, value->key_nbytes) == 0))
        value = value->next;
    return value;
}

bool is_text(const Json *value, const char *text)
{
    return value != NULL && value->type == TEXT && value->nbytes == strlen(text) &&
           memcmp(value->text, text, value->nbytes) == 0;
}

bool is_integer(const Json *value, uint64_t least, uint64_t most)
{
    return value != NULL && value->type == INTEGER && !(value->negative && value->magnitude > 0) &&
           value->magnitude >= least && value->magnitude <= most;
}

bool only_members(const Json *value, const char *keys)
{
    if (value == NULL || value->type != OBJECT)
        return false;
    size_t n_known = 0;
    for (const char *key = keys; *key != 0; key += strspn(key, " ")) {
        size_t n = strcspn(key, " ");
        for (const Json *one = value->first; one != NULL; one = one->next)
            n_known += one->key_nbytes == n && memcmp(one->key, key, n) == 0;
        key += n;
    }
    return n_known == value->n;
}

void print_text(FILE *out, const char *text, size_t nbytes)
{
    static const char special[] = "\"\\\b\f\n\r\t", escapes[] = "\"\\bfnrt";
    const uint8_t *s = (const uint8_t *)text;
    fputc('"', out);
    for (size_t i = 0, n; i < nbytes; i += n) {
        n = utf8_nbytes(s + i, nbytes - i);
        const char *found = s[i] == 0 ? NULL : strchr(special, s[i]);
        uint32_t c = n == 1 ? s[i] : s[i] & (0x7fu >> n);
        for (size_t k = 1; k < n; k++)
            c = c << 6 | (s[i + k] & 0x3f);
        if (found != NULL)
            fprintf(out, "\\%c", escapes[found - special]);
        else if (c >= 0x20 && c < 0x7f)
            fputc((int)c, out);
        else if (c < 0x10000)
            fprintf(out, "\\u%04x", (unsigned)c);
        else
            fprintf(out, "\\u%04x\\u%04x", (unsigned)(0xd800 + ((c - 0x10000) >> 10)), (unsigned)(0xdc00 + (c & 0x3ff)));
    }
    fputc('"', out);
}

void print_json(FILE *out, const Json *value)
{
    uint64_t bits;
    memcpy(&bits, &value->real, sizeof bits);
    switch (value->type) {
    case NOTHING:
        fputs("null", out);
        break;
    case BOOLEAN:
        fputs(value->magnitude ? "true" : "false", out);
        break;
    case INTEGER:
        fprintf(out, "%s%llu", value->negative ? "-" : "", (unsigned long long)value->magnitude);
        break;
    case REAL:
        fprintf(out, "\"%016llx\"", (unsigned long long)bits);
        break;
    case TEXT:
        print_text(out, value->text, value->nbytes);
        break;
    case LIST:
    case OBJECT:
        fputc(value->type == LIST ? '[' : '{', out);
        for (const Json *one = value->first; one != NULL; one = one->next) {
            if (one != value->first)
                fputc(',', out);
            if (value->type == OBJECT) {
                print_text(out, one->key, one->key_nbytes);
                fputc(':', out);
            }
            print_json(out, one);
        }
        fputc(value->type == LIST ? ']' : '}', out);
    }
}
