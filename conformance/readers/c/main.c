/* The program: one request on standard input, the answer on standard output. Exit code 0, 65 (a rule is broken) or 1. */
#include "reader.h"

#include <stdlib.h>

#define MAX_REQUEST_BYTES ((size_t)16 << 20)

int main(int n_arguments, char **arguments)
{
    if (n_arguments > 1) {
        fprintf(stderr, "usage: %s < request.json\n", arguments[0]);
        return GAVE_UP;
    }
    uint8_t *request = malloc(MAX_REQUEST_BYTES);
    if (request == NULL)
        return GAVE_UP;
    size_t nbytes = fread(request, 1, MAX_REQUEST_BYTES, stdin);
    bool is_whole = !ferror(stdin) && nbytes < MAX_REQUEST_BYTES;
    if (!is_whole)
        fprintf(stderr, "flash_reader: cannot read the request\n");
    int code = is_whole ? answer(request, nbytes, stdout) : GAVE_UP;
    free(request);
    return code;
}
