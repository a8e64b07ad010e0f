/* Requests and answers: structure, decoded values, verification of all bytes (SPEC sections 9 to 13, 15). */
#include "reader.h"

#include <stdlib.h>
#include <string.h>

/* ---- decoding ---- */

/* Encoded rows. A tensor in a plain encoding is one row. */
typedef struct {
    Encoding encoding;
    const uint8_t *data;
    uint64_t n_rows, n_weights, row_nbytes; /* `n_weights`: of a row */
} Rows;

static float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* binary16 as binary32; exact. */
static uint32_t widened(uint32_t half)
{
    uint32_t sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
    if (exponent == 31)
        return sign | 0x7f800000 | fraction << 13;
    if (exponent > 0)
        return sign | (exponent + 112) << 23 | fraction << 13;
    if (fraction == 0)
        return sign;
    for (exponent = 113; (fraction & 0x400) == 0; exponent--)
        fraction <<= 1;
    return sign | exponent << 23 | (fraction & 0x3ff) << 13;
}

/* Weight j of a row: the bits of a binary32, or an integer. */
static uint32_t decoded(const Rows *rows, const uint8_t *row, uint64_t j)
{
    switch (rows->encoding) {
    case F16:
        return widened((uint32_t)little_endian(row + 2 * j, 2));
    case BF16:
        return (uint32_t)little_endian(row + 2 * j, 2) << 16;
    case Q8: {
        int value = row[64 + j] < 128 ? row[64 + j] : row[64 + j] - 256;
        return bits_of(float_of((uint32_t)little_endian(row, 4)) * (float)value);
    }
    case Q4: {
        float scale = float_of(widened((uint32_t)little_endian(row + 2 * (j / 32), 2)));
        uint8_t byte = row[round_up(rows->n_weights / 16, 64) + j / 64 * 32 + j % 32];
        return bits_of(scale * (float)((j % 64 < 32 ? byte & 15 : byte >> 4) - 8));
    }
    case U8:
        return row[j];
    default:
        return (uint32_t)little_endian(row + 4 * j, 4);
    }
}

static uint32_t decoded_at(const Rows *rows, uint64_t i)
{
    return decoded(rows, rows->data + i / rows->n_weights * rows->row_nbytes, i % rows->n_weights);
}

static Rows rows_of_tensor(const Model *model, const Array *tensor)
{
    if (strcmp(tensor->codec, "raw") != 0)
        give_up("compressed tensors are not supported");
    Rows rows = {tensor->encoding, entry_bytes(&model->container, tensor->chunk), 1, 0, tensor->chunk->nbytes};
    if (is_packed(tensor->encoding)) {
        rows.n_rows = tensor->logical.of[0];
        rows.n_weights = tensor->logical.of[1];
        rows.row_nbytes = tensor->storage.of[1];
    } else {
        rows.n_weights = tensor->chunk->nbytes / ENCODINGS[tensor->encoding].item_nbytes;
    }
    return rows;
}

static Rows rows_of_bundle(const Array *bundles, const uint8_t *payload, uint64_t neuron)
{
    const uint8_t *bundle = payload + neuron * bundles->stride;
    return (Rows){bundles->encoding, bundle, bundles->n_parts, bundles->d_model, bundles->part_nbytes};
}

/* ---- checks that need payloads ---- */

static bool is_zero(const uint8_t *data, uint64_t nbytes)
{
    for (uint64_t i = 0; i < nbytes; i++)
        if (data[i] != 0)
            return false;
    return true;
}

/* Finite weights and zero padding. A scale that is not finite makes no weight finite. */
static void verify_rows(const Rows *rows)
{
    uint64_t n = rows->n_weights, values = round_up(n / 16, 64);
    for (uint64_t i = 0; i < rows->n_rows; i++) {
        const uint8_t *row = rows->data + i * rows->row_nbytes;
        for (uint64_t j = 0; j < n && ENCODINGS[rows->encoding].holds_weights; j++)
            require((decoded(rows, row, j) & 0x7f800000) != 0x7f800000, "FF-TEN-4");
        if (rows->encoding == Q8)
            require(is_zero(row + 4, 60), "FF-TEN-5");
        if (rows->encoding == Q4) {
            require(is_zero(row + n / 16, values - n / 16), "FF-TEN-5");
            require(is_zero(row + values + n / 2, rows->row_nbytes - values - n / 2), "FF-TEN-5");
        }
    }
}

static void check_shard_index(const Array *bundles, const uint8_t *payload)
{
    const uint8_t *index = payload + bundles->n_neurons * bundles->stride;
    uint64_t nbytes = 16 * bundles->n_neurons;
    require(same_crc((uint32_t)little_endian(index + nbytes, 4), crc32c(0, index, nbytes)), "FF-IDX-2");
    for (uint64_t i = 0; i < bundles->n_neurons; i++) {
        require(little_endian(index + 16 * i, 8) == i * bundles->stride, "FF-IDX-3");
        require(little_endian(index + 16 * i + 8, 8) == bundles->row_nbytes, "FF-IDX-3");
    }
}

static void check_shard_indices(const Model *model)
{
    for (uint64_t layer = 0; layer < model->n_layers; layer++) {
        void *before = mark();
        const Array *bundles = bundles_of(model, layer);
        check_shard_index(bundles, entry_bytes(&model->container, bundles->chunk));
        release(before);
    }
}

static void verify_bundles(const Model *model, const Array *bundles, const uint8_t *payload, const Array *checksums)
{
    Rows stated = rows_of_tensor(model, checksums);
    for (uint64_t i = 0; i < bundles->n_neurons; i++) {
        Rows bundle = rows_of_bundle(bundles, payload, i);
        require(same_crc(decoded_at(&stated, i), crc32c(0, bundle.data, bundles->row_nbytes)), "FF-SUM-5");
        verify_rows(&bundle);
        require(is_zero(bundle.data + bundles->row_nbytes, bundles->stride - bundles->row_nbytes), "FF-BND-8");
    }
}

static void verify_statistics(const Model *model, uint64_t layer)
{
    char name[64];
    snprintf(name, sizeof name, "layers/%llu/statistics/firing_frequency", (unsigned long long)layer);
    Rows frequency = rows_of_tensor(model, find_array(model, name));
    for (uint64_t i = 0; i < frequency.n_weights; i++) {
        float value = float_of(decoded_at(&frequency, i));
        require(value >= 0 && value <= 1, "FF-STAT-1");
    }
    snprintf(name, sizeof name, "layers/%llu/statistics/aggregated_window", (unsigned long long)layer);
    Rows window = rows_of_tensor(model, find_array(model, name));
    float before = 0;
    for (uint64_t i = 0; i < window.n_weights; i++) {
        float value = float_of(decoded_at(&window, i));
        require(value >= before, "FF-STAT-2");
        before = value;
    }
}

static void verify_array(const Model *model, const Array *array)
{
    static const char *const rules[] = {[TENSOR] = "FF-SUM-3", [EMBEDDED_FILE] = "FF-SUM-6", [BUNDLES] = "FF-SUM-4"};
    const uint8_t *payload = entry_bytes(&model->container, array->chunk);
    require(same_crc(array->crc32c, crc32c(0, payload, array->chunk->nbytes)), rules[array->kind]);
    if (array->kind == EMBEDDED_FILE) {
        Sha256 sha;
        char hex[65];
        sha256_begin(&sha);
        sha256_feed(&sha, payload, array->chunk->nbytes);
        sha256_end(&sha, hex);
        require(strcmp(hex, array->sha256) == 0, "FF-SUM-6");
    } else if (array->kind == TENSOR && strcmp(array->codec, "raw") == 0) {
        Rows rows = rows_of_tensor(model, array);
        verify_rows(&rows);
    }
}

static void verify(const Model *model)
{
    const Container *container = &model->container;
    for (size_t i = 0; i < container->n_entries && !container->is_directory; i++) {
        const Entry *entry = &container->entries[i];
        require(same_crc(entry->crc32, crc32(entry_bytes(container, entry), entry->nbytes)), "FF-ZIP-13");
    }
    bool is_complete = true;
    for (size_t i = 0; i < model->n_arrays; i++) {
        void *before = mark();
        verify_array(model, &model->arrays[i]);
        is_complete &= model->arrays[i].kind == BUNDLES || strcmp(model->arrays[i].codec, "raw") == 0;
        release(before);
    }
    check_shard_indices(model);
    for (uint64_t layer = 0; layer < model->n_layers; layer++) {
        char name[64];
        void *before = mark();
        const Array *bundles = bundles_of(model, layer);
        snprintf(name, sizeof name, "layers/%llu/ffn/bundle_crc32c", (unsigned long long)layer);
        verify_bundles(model, bundles, entry_bytes(&model->container, bundles->chunk), find_array(model, name));
        if (member(model->manifest, "statistics")->type != NOTHING)
            verify_statistics(model, layer);
        release(before);
    }
    if (!is_complete)
        give_up("compressed tensors are not supported");
}

/* ---- answers ---- */

typedef struct {
    const uint8_t *text;
    size_t nbytes;
    FILE *out;
    bool is_understood; /* from here on, a broken rule is the model's */
} Request;

static const char *between(size_t i)
{
    return i == 0 ? "" : ",";
}

static void print_name(FILE *out, const char *name)
{
    print_text(out, name, strlen(name));
}

static void print_shape(FILE *out, const char *key, const Shape *shape)
{
    fprintf(out, "\"%s\":[", key);
    for (size_t i = 0; i < shape->n; i++)
        fprintf(out, "%s%llu", between(i), (unsigned long long)shape->of[i]);
    fputc(']', out);
}

static void print_integer(FILE *out, const char *key, uint64_t value)
{
    fprintf(out, "\"%s\":%llu", key, (unsigned long long)value);
}

static void print_extent(FILE *out, const Array *array)
{
    fputs("\"key\":", out);
    print_name(out, array->chunk->key);
    if (array->kind == BUNDLES) {
        fputc(',', out);
        print_integer(out, "n_neurons", array->n_neurons);
    }
    fputc(',', out);
    print_integer(out, "nbytes", array->chunk->nbytes);
    fputc(',', out);
    print_integer(out, "offset", array->chunk->offset);
}

static void print_bundles(FILE *out, const Array *array)
{
    fputc('{', out);
    print_integer(out, "alignment", array->alignment);
    fputc(',', out);
    print_integer(out, "d_model", array->d_model);
    fprintf(out, ",\"encoding\":\"%s\",", ENCODINGS[array->encoding].name);
    print_extent(out, array);
    fputc(',', out);
    print_integer(out, "part_nbytes", array->part_nbytes);
    fputs(",\"parts\":[", out);
    for (size_t p = 0; p < array->n_parts; p++)
        fprintf(out, "%s\"%s\"", between(p), part_name(array, p));
    fputs("],", out);
    print_integer(out, "row_nbytes", array->row_nbytes);
    fputc(',', out);
    print_integer(out, "stride", array->stride);
    fputc('}', out);
}

static void print_tensor(FILE *out, const Array *array)
{
    fprintf(out, "{\"codec\":\"%s\",\"encoding\":\"%s\",", array->codec, ENCODINGS[array->encoding].name);
    print_extent(out, array);
    fputc(',', out);
    print_shape(out, "shape", &array->logical);
    fputc(',', out);
    print_shape(out, "storage_shape", &array->storage);
    fputc('}', out);
}

static void print_file(FILE *out, const Array *array)
{
    fputs("{\"filename\":", out);
    print_name(out, array->filename);
    fputc(',', out);
    print_extent(out, array);
    fprintf(out, ",\"sha256\":\"%s\"}", array->sha256);
}

static void print_summary(FILE *out, const Rows *rows)
{
    Sha256 sha;
    char hex[65];
    uint64_t n = rows->n_rows * rows->n_weights;
    sha256_begin(&sha);
    for (uint64_t i = 0; i < n; i++) {
        uint32_t word = decoded_at(rows, i);
        uint8_t bytes[4] = {(uint8_t)word, (uint8_t)(word >> 8), (uint8_t)(word >> 16), (uint8_t)(word >> 24)};
        sha256_feed(&sha, bytes, 4);
    }
    sha256_end(&sha, hex);
    fprintf(out, "{\"samples\":[\"%08x\",\"%08x\",\"%08x\"],\"sha256\":\"%s\"}", (unsigned)decoded_at(rows, 0),
            (unsigned)decoded_at(rows, n / 2), (unsigned)decoded_at(rows, n - 1), hex);
}

/* ---- requests ---- */

/* The bundle that a pair [layer, neuron] of a request names. */
static const Array *chosen_bundle(const Model *model, const Json *pair, uint64_t *neuron)
{
    bool is_pair = pair->type == LIST && pair->n == 2 && is_integer(pair->first, 0, model->n_layers - 1);
    const Array *bundles = is_pair ? bundles_of(model, pair->first->magnitude) : NULL;
    if (bundles == NULL || !is_integer(pair->first->next, 0, bundles->n_neurons - 1))
        give_up("the model has no such bundle");
    *neuron = pair->first->next->magnitude;
    return bundles;
}

static void print_chosen(FILE *out, const Model *model, const Json *pairs, bool is_decoded)
{
    fputc('[', out);
    for (const Json *pair = pairs->first; pair != NULL; pair = pair->next) {
        void *before = mark();
        uint64_t neuron;
        const Array *bundles = chosen_bundle(model, pair, &neuron);
        Rows rows = rows_of_bundle(bundles, entry_bytes(&model->container, bundles->chunk), neuron);
        fputs(between(pair != pairs->first), out);
        if (is_decoded) {
            print_summary(out, &rows);
        } else {
            Sha256 sha;
            char hex[65];
            sha256_begin(&sha);
            sha256_feed(&sha, rows.data, bundles->row_nbytes);
            sha256_end(&sha, hex);
            fputc('{', out);
            print_integer(out, "nbytes", bundles->row_nbytes);
            fputc(',', out);
            print_integer(out, "offset", bundles->chunk->offset + neuron * bundles->stride);
            fprintf(out, ",\"sha256\":\"%s\"}", hex);
        }
        release(before);
    }
    fputc(']', out);
}

/* All arrays of a kind as an object, without the first `n_prefix` characters of their names. */
static void print_arrays(FILE *out, const Model *model, Kind kind, size_t n_prefix, void (*print)(FILE *, const Array *))
{
    size_t n = 0;
    fputc('{', out);
    for (size_t i = 0; i < model->n_arrays; i++) {
        const Array *array = &model->arrays[i];
        if (array->kind != kind)
            continue;
        fputs(between(n++), out);
        print_name(out, array->name + n_prefix);
        fputc(':', out);
        print(out, array);
    }
    fputc('}', out);
}

static void answer_structure(FILE *out, const Model *model, const Json *pairs)
{
    fputs("{\"bundles\":[", out);
    for (uint64_t layer = 0; layer < model->n_layers; layer++) {
        fputs(between(layer > 0), out);
        print_bundles(out, bundles_of(model, layer));
    }
    fputs("],\"chosen\":", out);
    print_chosen(out, model, pairs, false);
    fprintf(out, ",\"container\":\"%s\",\"files\":", model->container.is_directory ? "directory" : "file");
    print_arrays(out, model, EMBEDDED_FILE, strlen("files/"), print_file);
    fputs(",\"manifest\":", out);
    print_json(out, model->manifest);
    fputs(",\"tensors\":", out);
    print_arrays(out, model, TENSOR, 0, print_tensor);
    fputc('}', out);
}

static void answer_values(FILE *out, const Model *model, const Json *names, const Json *pairs)
{
    for (const Json *name = names->first; name != NULL; name = name->next) {
        Array *array = name->type == TEXT ? find_array(model, name->text) : NULL;
        if (array == NULL || array->kind != TENSOR)
            give_up("the model has no such tensor");
        array->is_asked_for = true;
    }
    fputs("{\"bundles\":", out);
    print_chosen(out, model, pairs, true);
    fputs(",\"tensors\":{", out);
    size_t n = 0;
    for (size_t i = 0; i < model->n_arrays; i++) {
        if (!model->arrays[i].is_asked_for)
            continue;
        void *before = mark();
        Rows rows = rows_of_tensor(model, &model->arrays[i]);
        fputs(between(n++), out);
        print_name(out, model->arrays[i].name);
        fputc(':', out);
        print_summary(out, &rows);
        release(before);
    }
    fputs("}}", out);
}

static void answer_request(void *argument)
{
    Request *request = argument;
    const Json *json = parse_json(request->text, request->nbytes), *level = member(json, "level");
    const Json *path = member(json, "path"), *pairs = member(json, "bundles"), *names = member(json, "tensors");
    const Json none = {.type = LIST};
    Model model;
    if (is_text(level, "capabilities")) {
        fputs("{\"codecs\":[\"raw\"],\"containers\":[\"file\",\"directory\"],"
              "\"encodings\":[\"f32\",\"f16\",\"bf16\",\"q8\",\"q4\",\"u8\",\"u32\"],"
              "\"levels\":[\"structure\",\"values\",\"integrity\"],\"name\":\"flash_reader.c\",\"spec\":\"1.0\"}",
              request->out);
        return;
    }
    bool is_structure = is_text(level, "structure"), is_values = is_text(level, "values");
    if (!is_structure && !is_values && !is_text(level, "integrity"))
        give_up("unknown level");
    if (path == NULL || path->type != TEXT || strlen(path->text) != path->nbytes)
        give_up("the request has no path");
    if ((pairs != NULL && pairs->type != LIST) || (names != NULL && names->type != LIST))
        give_up("bundles and tensors are lists");
    pairs = pairs == NULL ? &none : pairs;
    names = names == NULL ? &none : names;

    request->is_understood = true;
    open_model(&model, path->text);
    if (is_structure || is_values)
        check_shard_indices(&model); /* before any bundle is handed out */
    if (is_structure) {
        answer_structure(request->out, &model, pairs);
    } else if (is_values) {
        answer_values(request->out, &model, names, pairs);
    } else {
        verify(&model);
        fputs("{\"verified\":true}", request->out);
    }
}

int answer(const uint8_t *text, size_t nbytes, FILE *out)
{
    char *written = NULL;
    size_t n_written = 0;
    const char *why;
    Request request = {text, nbytes, open_memstream(&written, &n_written), false};
    if (request.out == NULL)
        return GAVE_UP;
    Outcome outcome = attempt(answer_request, &request, &why);
    bool is_written = fclose(request.out) == 0;
    if (outcome == BROKEN && !request.is_understood) {
        outcome = GAVE_UP;
        why = "the request is not valid JSON";
    }
    if (outcome == FINISHED && is_written)
        fprintf(out, "%s\n", written);
    else if (outcome == BROKEN)
        fprintf(out, "{\"rule\":\"%s\"}\n", why);
    else
        fprintf(stderr, "flash_reader: %s\n", why);
    free(written);
    return is_written && fflush(out) == 0 ? (int)outcome : GAVE_UP;
}
