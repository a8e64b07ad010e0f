/* Encodings, and the documents of arrays with their chunks (SPEC sections 6, 9 to 12, 17). */
#include "reader.h"

#include <stdlib.h>
#include <string.h>

#define MAX_DIMENSION ((uint64_t)1 << 31)
#define MAX_ROW_BYTES ((uint64_t)1 << 24)
#define MAX_EMBEDDED_FILE_BYTES ((uint64_t)1 << 28)

const EncodingInfo ENCODINGS[N_ENCODINGS] = {
    {"f32", "float32", 4, true}, {"f16", "float16", 2, true}, {"bf16", "uint16", 2, true}, {"q8", "uint8", 1, true},
    {"q4", "uint8", 1, true},    {"u8", "uint8", 1, false},   {"u32", "uint32", 4, false},
};

bool is_packed(Encoding encoding)
{
    return encoding == Q8 || encoding == Q4;
}

uint64_t round_up(uint64_t value, uint64_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

uint64_t encoded_nbytes(Encoding encoding, uint64_t n)
{
    if (encoding == Q8)
        return 64 + n;
    if (encoding == Q4)
        return round_up(round_up(n / 16, 64) + n / 2, 64);
    return n * ENCODINGS[encoding].item_nbytes;
}

/* ---- array documents ---- */

/* 1 to 8 integers, none of them zero; what else it is breaks `rule`. */
static Shape read_shape(const Json *list, const char *rule)
{
    Shape shape = {0, {0}};
    require(list != NULL && list->type == LIST && list->n >= 1 && list->n <= MAX_DIMENSIONS, rule);
    for (const Json *one = list->first; one != NULL; one = one->next) {
        require(is_integer(one, 1, UINT64_MAX), rule);
        require(one->magnitude <= MAX_DIMENSION, "FF-LIM-7");
        shape.of[shape.n++] = one->magnitude;
    }
    return shape;
}

bool same_shape(const Shape *a, const Shape *b)
{
    return a->n == b->n && memcmp(a->of, b->of, a->n * sizeof *a->of) == 0;
}

static bool is_shape(const Json *list, const Shape *shape)
{
    if (list == NULL || list->type != LIST || list->n != shape->n)
        return false;
    size_t i = 0;
    for (const Json *one = list->first; one != NULL; one = one->next, i++)
        if (!is_integer(one, shape->of[i], shape->of[i]))
            return false;
    return true;
}

/* Bytes of a storage shape; UINT64_MAX where they do not fit. */
static uint64_t storage_nbytes(const Shape *shape, unsigned item_nbytes)
{
    uint64_t n = item_nbytes;
    for (size_t i = 0; i < shape->n; i++) {
        if (n > UINT64_MAX / shape->of[i])
            return UINT64_MAX;
        n *= shape->of[i];
    }
    return n;
}

/* An object {"name": name, "configuration": {...}}; the configuration may be absent, then `*configuration` is NULL. */
static bool is_named(const Json *value, const char *name, const Json **configuration)
{
    *configuration = member(value, "configuration");
    return only_members(value, "name configuration") && is_text(member(value, "name"), name) &&
           (*configuration == NULL || (*configuration)->type == OBJECT);
}

static bool is_bytes_codec(const Json *codec, unsigned item_nbytes)
{
    const Json *configuration;
    if (!is_named(codec, "bytes", &configuration))
        return false;
    if (item_nbytes == 1)
        return configuration == NULL;
    return only_members(configuration, "endian") && is_text(member(configuration, "endian"), "little");
}

static bool is_any_integer(const Json *value)
{
    return value == NULL || value->type == INTEGER;
}

static bool is_optional_choice(const Json *value, const char *choice)
{
    return value == NULL || (value->type == TEXT && is_choice(value, choice, strlen(choice)));
}

/* Name of a compressor of section 6.2, or NULL. */
static const char *compressor_name(const Json *codec)
{
    const Json *c;
    if (is_named(codec, "zstd", &c)) {
        const Json *checksum = member(c, "checksum");
        bool is_known = (c == NULL || only_members(c, "level checksum")) && is_any_integer(member(c, "level")) &&
                        (checksum == NULL || checksum->type == BOOLEAN);
        return is_known ? "zstd" : NULL;
    }
    if (is_named(codec, "blosc", &c)) {
        bool is_known = (c == NULL || only_members(c, "cname clevel shuffle typesize blocksize")) &&
                        is_optional_choice(member(c, "cname"), "lz4|lz4hc|blosclz|zstd|zlib") &&
                        is_optional_choice(member(c, "shuffle"), "noshuffle|shuffle|bitshuffle") &&
                        is_any_integer(member(c, "clevel")) && is_any_integer(member(c, "typesize")) &&
                        is_any_integer(member(c, "blocksize"));
        return is_known ? "blosc" : NULL;
    }
    return NULL;
}

static void check_sharding(const Json *codecs, const Shape *storage, unsigned item_nbytes)
{
    const Json *c, *ignored;
    require(codecs->n == 1 && is_named(codecs->first, "sharding_indexed", &c), "FF-BND-5");
    require(only_members(c, "chunk_shape codecs index_codecs index_location"), "FF-BND-5");
    const Json *inner = member(c, "codecs"), *index = member(c, "index_codecs"), *location = member(c, "index_location");
    Shape bundle = *storage;
    bundle.of[0] = 1;
    require(is_shape(member(c, "chunk_shape"), &bundle), "FF-BND-5");
    require(inner != NULL && inner->type == LIST && inner->n == 1 && is_bytes_codec(inner->first, item_nbytes), "FF-BND-5");
    require(index != NULL && index->type == LIST && index->n == 2 && is_bytes_codec(index->first, 8), "FF-BND-5");
    require(is_named(index->first->next, "crc32c", &ignored) && ignored == NULL, "FF-BND-5");
    require(location == NULL || is_text(location, "end"), "FF-BND-5");
}

/* What holds for all arrays (FF-ARR-3 to FF-ARR-7). */
static Shape read_zarr_fields(const Json *document)
{
    static const char *const required[] = {
        "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs",
        "attributes",
    };
    for (size_t i = 0; i < sizeof required / sizeof *required; i++)
        require(member(document, required[i]) != NULL, "FF-ARR-3");
    require(only_members(document, "zarr_format node_type shape data_type chunk_grid chunk_key_encoding fill_value codecs "
                                   "attributes storage_transformers dimension_names"), "FF-ARR-3");
    const Json *transformers = member(document, "storage_transformers"), *names = member(document, "dimension_names");
    require(transformers == NULL || (transformers->type == LIST && transformers->n == 0), "FF-ARR-3");
    Shape shape = read_shape(member(document, "shape"), "FF-ARR-4");
    if (names != NULL && names->type != NOTHING) {
        require(names->type == LIST && names->n == shape.n, "FF-ARR-3");
        for (const Json *name = names->first; name != NULL; name = name->next)
            require(name->type == NOTHING || name->type == TEXT, "FF-ARR-3");
    }
    const Json *c, *separator, *fill = member(document, "fill_value");
    require(is_named(member(document, "chunk_grid"), "regular", &c) && only_members(c, "chunk_shape"), "FF-ARR-5");
    require(is_shape(member(c, "chunk_shape"), &shape), "FF-ARR-5");
    require(is_named(member(document, "chunk_key_encoding"), "default", &c), "FF-ARR-6");
    separator = member(c, "separator");
    require(c == NULL || only_members(c, "separator"), "FF-ARR-6");
    require(separator == NULL || is_text(separator, "/"), "FF-ARR-6");
    require((fill->type == INTEGER || fill->type == REAL) && fill->real == 0, "FF-ARR-7");
    require(member(document, "codecs")->type == LIST, "FF-ARR-8");
    return shape;
}

static Encoding read_encoding(const Json *ours)
{
    const Json *name = member(ours, "encoding");
    for (int encoding = 0; encoding < N_ENCODINGS; encoding++)
        if (is_text(name, ENCODINGS[encoding].name))
            return (Encoding)encoding;
    broken("FF-ARR-10");
}

static void read_tensor(Array *array, const Json *ours, const Json *document)
{
    const Json *codecs = member(document, "codecs");
    array->kind = TENSOR;
    array->encoding = read_encoding(ours);
    const EncodingInfo *encoding = &ENCODINGS[array->encoding];
    array->logical = read_shape(member(ours, "shape"), "FF-ARR-10");

    require(codecs->n == 1 || codecs->n == 2, "FF-ARR-8");
    require(is_bytes_codec(codecs->first, encoding->item_nbytes), "FF-ARR-8");
    array->codec = codecs->n == 1 ? "raw" : compressor_name(codecs->first->next);
    require(array->codec != NULL, "FF-ARR-8");
    require(is_text(member(document, "data_type"), encoding->data_type), "FF-ARR-9");

    Shape expected = array->logical;
    if (is_packed(array->encoding)) {
        require(expected.n == 2 && is_aligned(expected.of[1], 64), "FF-TEN-1");
        expected.of[1] = encoded_nbytes(array->encoding, expected.of[1]);
        require(expected.of[1] <= MAX_ROW_BYTES, "FF-LIM-6");
    }
    require(same_shape(&array->storage, &expected), "FF-TEN-1");
}

static void read_file(Array *array, const Json *ours, const Json *document)
{
    const Json *filename = member(ours, "filename"), *sha256 = member(ours, "sha256"), *codecs = member(document, "codecs");
    const char *role = strncmp(array->name, "files/", 6) == 0 ? array->name + 6 : "";
    Json as_text = {.type = TEXT, .text = role, .nbytes = strlen(role)};
    array->kind = EMBEDDED_FILE;
    array->encoding = U8;
    array->codec = "raw";
    require(filename != NULL && filename->type == TEXT && is_hex(sha256, 64), "FF-ARR-10");
    require(is_name(&as_text), "FF-FILE-1");
    require(array->storage.n == 1 && is_text(member(document, "data_type"), "uint8"), "FF-FILE-1");
    require(codecs->n == 1 && is_bytes_codec(codecs->first, 1), "FF-ARR-8");
    require(filename->nbytes >= 1 && filename->nbytes <= 255, "FF-FILE-2");
    require(!is_text(filename, ".") && !is_text(filename, ".."), "FF-FILE-2");
    for (size_t i = 0; i < filename->nbytes; i++) {
        char c = filename->text[i];
        require(c >= 0x20 && c < 0x7f && c != '/' && c != '\\', "FF-FILE-2");
    }
    require(array->storage.of[0] <= MAX_EMBEDDED_FILE_BYTES, "FF-LIM-8");
    memcpy(array->filename, filename->text, filename->nbytes);
    memcpy(array->sha256, sha256->text, sha256->nbytes);
}

static uint64_t read_size(const Json *ours, const char *field)
{
    const Json *value = member(ours, field);
    require(is_integer(value, 0, UINT64_MAX), "FF-ARR-10");
    return value->magnitude;
}

const char *part_name(const Array *bundles, size_t part)
{
    static const char *const names[] = {"gate", "up", "down"};
    return names[part + 3 - bundles->n_parts];
}

static void read_bundles(const Model *model, Array *array, const Json *ours, const Json *document)
{
    const Json *ffn = member(model->decoder, "ffn"), *parts = member(ours, "parts");
    array->kind = BUNDLES;
    array->encoding = read_encoding(ours);
    array->n_neurons = read_size(ours, "n_neurons");
    array->d_model = read_size(ours, "d_model");
    array->part_nbytes = read_size(ours, "part_nbytes");
    array->row_nbytes = read_size(ours, "row_nbytes");
    array->stride = read_size(ours, "stride");
    array->alignment = read_size(ours, "alignment");
    require(parts != NULL && parts->type == LIST, "FF-ARR-10");

    array->n_parts = is_text(member(ffn, "kind"), "gated") ? 3 : 2;
    require(parts->n == array->n_parts, "FF-BND-1");
    size_t p = 0;
    for (const Json *part = parts->first; part != NULL; part = part->next)
        require(is_text(part, part_name(array, p++)), "FF-BND-1");
    require(array->n_neurons == integer_of(ffn, "d_ff"), "FF-BND-1");
    require(array->d_model == integer_of(model->decoder, "d_model"), "FF-BND-1");

    const EncodingInfo *encoding = &ENCODINGS[array->encoding];
    bool packed = is_packed(array->encoding);
    require(encoding->holds_weights && (!packed || is_aligned(array->d_model, 64)), "FF-BND-2");
    require(array->part_nbytes == encoded_nbytes(array->encoding, array->d_model), "FF-BND-3");
    require(array->row_nbytes == array->n_parts * array->part_nbytes, "FF-BND-3");
    require(array->row_nbytes <= MAX_ROW_BYTES && array->stride <= MAX_ROW_BYTES, "FF-LIM-6");
    Shape expected = {3, {array->n_neurons, array->n_parts, packed ? array->part_nbytes : array->d_model}};
    require(same_shape(&array->storage, &expected), "FF-BND-4");
    require(is_text(member(document, "data_type"), encoding->data_type), "FF-ARR-9");
    check_sharding(member(document, "codecs"), &array->storage, encoding->item_nbytes);
    require(array->stride >= array->row_nbytes, "FF-BND-6");
    uint64_t alignment = array->alignment;
    require(alignment >= 64 && alignment <= 32768 && (alignment & (alignment - 1)) == 0, "FF-ALIGN-4");
    require(is_aligned(array->stride, alignment), "FF-ALIGN-5");
}

static const char *chunk_key(const char *name, size_t n_dimensions)
{
    char *key = take(strlen(name) + 2 + 2 * n_dimensions + 1);
    char *end = key + sprintf(key, "%s/c", name);
    while (n_dimensions-- > 0)
        end += sprintf(end, "/0");
    return key;
}

static void check_payload(const Container *container, const Array *array)
{
    const Entry *chunk = array->chunk;
    if (array->kind == BUNDLES)
        require(chunk->nbytes == array->n_neurons * (array->stride + 16) + 4, "FF-BND-7");
    else if (strcmp(array->codec, "raw") == 0)
        require(chunk->nbytes == storage_nbytes(&array->storage, ENCODINGS[array->encoding].item_nbytes), "FF-TEN-2");
    if (container->is_directory)
        return;
    if (array->kind == BUNDLES)
        require(is_aligned(chunk->offset, 16384) && is_aligned(chunk->offset, array->alignment), "FF-ALIGN-1");
    else
        require(is_aligned(chunk->offset, 64), "FF-ALIGN-2");
}

/* Fill in `array`, whose name is set, from its document. */
void read_array(const Model *model, Array *array, const Json *document)
{
    array->storage = read_zarr_fields(document);
    const Json *ours = member(member(document, "attributes"), "flashfmt"), *kind = member(ours, "kind");
    require(ours != NULL && ours->type == OBJECT && is_hex(member(ours, "crc32c"), 8), "FF-ARR-10");
    array->crc32c = (uint32_t)strtoul(member(ours, "crc32c")->text, NULL, 16);
    bool is_extension = strncmp(array->name, "extensions/", 11) == 0;
    require(is_text(kind, "tensor") || !is_extension, "FF-ARR-10");
    if (is_text(kind, "tensor"))
        read_tensor(array, ours, document);
    else if (is_text(kind, "file"))
        read_file(array, ours, document);
    else if (is_text(kind, "bundles"))
        read_bundles(model, array, ours, document);
    else
        broken("FF-ARR-10");
    array->chunk = find_entry(&model->container, chunk_key(array->name, array->storage.n));
    require(array->chunk != NULL, "FF-ARR-12");
    array->chunk->is_chunk = true;
    check_payload(&model->container, array);
    array->is_called_for = is_extension || array->kind == EMBEDDED_FILE;
}
