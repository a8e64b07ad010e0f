/*
 * fuzz MODEL FILE N SEED: read a model N times, each time with other damage in FILE, which is the model or a file in its
 * directory. Prints one answer a line: the broken rule, or that the damage does not show. Exit code 1: the reader
 * gave neither answer; a sanitizer ends the program where memory is misused. FILE is damaged in place: give it a copy.
 */
#include "reader.h"

#include <stdlib.h>
#include <string.h>

static uint64_t state;

static uint64_t below(uint64_t n) /* xorshift64* */
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return n == 0 ? 0 : state * 0x2545f4914f6cdd1d % n;
}

static uint8_t other_byte(uint8_t byte)
{
    static const uint8_t telling[] = {0x00, 0x01, 0x7f, 0x80, 0xff, '"', '\\', '{', '[', ']', ',', '-', '0', '9', 'e', 'u'};
    switch (below(3)) {
    case 0:
        return (uint8_t)(byte ^ 1 << below(8));
    case 1:
        return telling[below(sizeof telling)];
    default:
        return (uint8_t)below(256);
    }
}

/* Change `data`; returns how much of it is left. */
static size_t damage(uint8_t *data, size_t nbytes)
{
    if (nbytes == 0 || below(8) == 0)
        return (size_t)below(nbytes);
    for (uint64_t n = 1 + below(3); n > 0; n--) {
        size_t at = (size_t)below(nbytes);
        for (int tries = 0; tries < 20 && data[at] == 0; tries++)
            at = (size_t)below(nbytes); /* most zeros are padding */
        data[at] = other_byte(data[at]);
    }
    return nbytes;
}

static bool write_all(const char *path, const uint8_t *data, size_t nbytes)
{
    FILE *file = fopen(path, "wb");
    if (file == NULL)
        return false;
    bool is_written = fwrite(data, 1, nbytes, file) == nbytes;
    return fclose(file) == 0 && is_written;
}

static size_t read_all(const char *path, uint8_t *data, size_t capacity)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL)
        return 0;
    size_t nbytes = fread(data, 1, capacity, file);
    fclose(file);
    return nbytes;
}

int main(int n_arguments, char **arguments)
{
    static const char *const levels[] = {"integrity", "structure"};
    enum { CAPACITY = 1 << 24 };
    if (n_arguments != 5) {
        fprintf(stderr, "usage: %s MODEL FILE N SEED\n", arguments[0]);
        return 1;
    }
    uint8_t *sound = malloc(CAPACITY), *damaged = malloc(CAPACITY);
    if (sound == NULL || damaged == NULL)
        return 1;
    size_t nbytes = read_all(arguments[2], sound, CAPACITY);
    unsigned long n_runs = strtoul(arguments[3], NULL, 10);
    state = strtoul(arguments[4], NULL, 10) * 2 + 1;
    int code = nbytes == 0;
    for (unsigned long run = 0; run < n_runs && code == 0; run++) {
        char request[1024];
        int n = snprintf(request, sizeof request, "{\"level\":\"%s\",\"path\":\"%s\"}", levels[below(2)], arguments[1]);
        memcpy(damaged, sound, nbytes);
        size_t n_left = damage(damaged, nbytes);
        if (n < 0 || (size_t)n >= sizeof request || !write_all(arguments[2], damaged, n_left))
            code = 1;
        FILE *nowhere = tmpfile();
        int outcome = nowhere == NULL ? GAVE_UP : answer((const uint8_t *)request, (size_t)n, nowhere);
        code |= outcome != FINISHED && outcome != BROKEN;
        char line[64] = "";
        if (nowhere != NULL) {
            rewind(nowhere);
            if (outcome == BROKEN && fgets(line, sizeof line, nowhere) != NULL)
                fputs(line, stdout);
            else if (outcome == FINISHED)
                puts("accepted");
            fclose(nowhere);
        }
    }
    free(sound);
    free(damaged);
    return code;
}
