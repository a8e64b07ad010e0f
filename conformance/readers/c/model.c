/* The hierarchy: its groups and arrays, and whether they are those that the manifest calls for (SPEC sections 6.1, 8). */
#include "reader.h"

#include <stdlib.h>
#include <string.h>

/* ---- the hierarchy ---- */

static const Json *read_document(const Container *container, const Entry *entry)
{
    require(entry->nbytes <= MAX_DOCUMENT_BYTES, "FF-LIM-3");
    return parse_json(entry_bytes(container, entry), (size_t)entry->nbytes);
}

static bool is_node_type(const Json *document, const char *type)
{
    require(is_integer(member(document, "zarr_format"), 3, 3), "FF-ARR-1");
    return is_text(member(document, "node_type"), type);
}

static void check_group(const Json *document)
{
    const Json *attributes = member(document, "attributes");
    require(only_members(document, "zarr_format node_type attributes"), "FF-ARR-2");
    require(attributes == NULL || attributes->type == OBJECT, "FF-ARR-2");
}

/* Name of the node of a document other than the root's. */
static char *node_name(const char *key)
{
    size_t n = strlen(key) - strlen("/zarr.json");
    char *name = take(n + 1);
    memcpy(name, key, n);
    return name;
}

static void check_parent(const Container *container, const char *name)
{
    const char *slash = strrchr(name, '/');
    require(strcmp(slash == NULL ? name : slash + 1, "zarr.json") != 0, "FF-ARR-11");
    if (slash == NULL)
        return;
    char *parent = take((size_t)(slash - name) + sizeof "/zarr.json");
    sprintf(parent, "%.*s/zarr.json", (int)(slash - name), name);
    const Entry *entry = find_entry(container, parent);
    require(entry != NULL && entry->is_group, "FF-ARR-2");
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const Array *)a)->name, ((const Array *)b)->name);
}

static void read_nodes(Model *model)
{
    Container *container = &model->container;
    size_t n_documents = 0;
    for (size_t i = 0; i < container->n_entries; i++)
        n_documents += container->entries[i].is_document;
    model->arrays = take(n_documents * sizeof *model->arrays);
    for (size_t i = 0; i < container->n_entries; i++) {
        Entry *entry = &container->entries[i];
        if (!entry->is_document || strcmp(entry->key, "zarr.json") == 0)
            continue;
        char *name = node_name(entry->key);
        void *before = mark();
        const Json *document = read_document(container, entry);
        entry->is_group = is_node_type(document, "group");
        if (entry->is_group) {
            check_group(document);
        } else {
            require(is_node_type(document, "array"), "FF-ARR-1");
            Array *array = &model->arrays[model->n_arrays++];
            array->name = name;
            read_array(model, array, document);
        }
        release(before);
    }
    for (size_t i = 0; i < container->n_entries; i++) {
        const Entry *entry = &container->entries[i];
        require(entry->is_document || entry->is_chunk, "FF-ARR-11");
        if (entry->is_document && strcmp(entry->key, "zarr.json") != 0)
            check_parent(container, node_name(entry->key));
    }
    qsort(model->arrays, model->n_arrays, sizeof *model->arrays, by_name);
}

Array *find_array(const Model *model, const char *name)
{
    Array wanted = {.name = name};
    return bsearch(&wanted, model->arrays, model->n_arrays, sizeof wanted, by_name);
}

Array *bundles_of(const Model *model, uint64_t layer)
{
    char name[64];
    snprintf(name, sizeof name, "layers/%llu/ffn/bundles", (unsigned long long)layer);
    return find_array(model, name);
}

/* ---- the arrays that the manifest calls for (section 8) ---- */

typedef enum { MATRIX, VECTOR, CHECKSUMS } Role;

/* Names begin with `prefix`; `n_columns` is that of a matrix. */
static void call_for(Model *model, Role role, const char *prefix, const char *name, uint64_t n_rows, uint64_t n_columns)
{
    char full[160];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    Array *array = find_array(model, full);
    require(array != NULL, "FF-MAN-11");
    require(array->kind == TENSOR, "FF-MAN-13");
    Shape expected = {role == MATRIX ? 2 : 1, {n_rows, n_columns}};
    require(same_shape(&array->logical, &expected), "FF-MAN-12");
    if (role == MATRIX)
        require(ENCODINGS[array->encoding].holds_weights, "FF-MAN-13");
    else
        require(array->encoding == (role == VECTOR ? F32 : U32), "FF-MAN-13");
    array->is_called_for = true;
}

static void call_for_norm(Model *model, const Json *norm, const char *prefix, const char *name, uint64_t width)
{
    char full[128];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    if (boolean_of(norm, "weight"))
        call_for(model, VECTOR, full, "/weight", width, 0);
    if (boolean_of(norm, "bias"))
        call_for(model, VECTOR, full, "/bias", width, 0);
}

static void call_for_ends(Model *model)
{
    const Json *d = model->decoder, *norm = member(d, "norm");
    const Json *embedding = member(d, "embedding"), *logits = member(d, "logits");
    uint64_t d_model = integer_of(d, "d_model"), d_embed = integer_of(embedding, "d_embed");
    uint64_t vocab = integer_of(d, "vocab_size");
    call_for(model, MATRIX, "embedding/", "tokens", vocab, d_embed);
    if (!is_null(d, "positions"))
        call_for(model, MATRIX, "embedding/", "positions", integer_of(member(d, "positions"), "n_rows"), d_model);
    if (boolean_of(embedding, "projection")) {
        call_for(model, MATRIX, "embedding/", "projection_in", d_model, d_embed);
        call_for(model, MATRIX, "embedding/", "projection_out", d_embed, d_model);
    }
    if (boolean_of(d, "embedding_norm"))
        call_for_norm(model, norm, "embedding/", "norm", d_model);
    if (boolean_of(d, "final_norm"))
        call_for_norm(model, norm, "", "final_norm", d_model);
    if (!boolean_of(logits, "tied"))
        call_for(model, MATRIX, "logits/", "weight", vocab, d_embed);
    if (boolean_of(logits, "bias"))
        call_for(model, VECTOR, "logits/", "bias", vocab, 0);
    for (const Json *table = member(d, "rotary")->first; table != NULL; table = table->next)
        call_for(model, VECTOR, "rotary/", member(table, "name")->text, integer_of(table, "n_dims") / 2, 0);
}

static void call_for_projection(Model *model, const char *prefix, const char *name, bool bias, uint64_t rows,
                                uint64_t columns)
{
    char full[128];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    call_for(model, MATRIX, full, "/weight", rows, columns);
    if (bias)
        call_for(model, VECTOR, full, "/bias", rows, 0);
}

static void call_for_layer(Model *model, unsigned long long layer)
{
    const Json *d = model->decoder, *a = member(d, "attention"), *ffn = member(d, "ffn"), *norm = member(d, "norm");
    uint64_t d_model = integer_of(d, "d_model"), d_ff = integer_of(ffn, "d_ff"), head_dim = integer_of(a, "head_dim");
    uint64_t width = integer_of(a, "n_heads") * head_dim, kv_width = integer_of(a, "n_kv_heads") * head_dim;
    bool qkv_bias = boolean_of(a, "qkv_bias"), by_head = is_text(member(a, "qk_norm_over"), "head");
    char at[64];
    snprintf(at, sizeof at, "layers/%llu/attention/", layer);
    call_for_norm(model, norm, at, "norm", d_model);
    call_for_projection(model, at, "q", qkv_bias, width, d_model);
    call_for_projection(model, at, "k", qkv_bias, kv_width, d_model);
    call_for_projection(model, at, "v", qkv_bias, kv_width, d_model);
    call_for_projection(model, at, "output", boolean_of(a, "output_bias"), d_model, width);
    if (!is_null(a, "qk_norm")) {
        call_for_norm(model, member(a, "qk_norm"), at, "q_norm", by_head ? head_dim : width);
        call_for_norm(model, member(a, "qk_norm"), at, "k_norm", by_head ? head_dim : kv_width);
    }
    snprintf(at, sizeof at, "layers/%llu/ffn/", layer);
    if (!boolean_of(member(d, "block"), "shared_norm"))
        call_for_norm(model, norm, at, "norm", d_model);
    if (boolean_of(ffn, "gate_bias"))
        call_for(model, VECTOR, at, "gate_bias", d_ff, 0);
    if (boolean_of(ffn, "up_bias"))
        call_for(model, VECTOR, at, "up_bias", d_ff, 0);
    if (boolean_of(ffn, "down_bias"))
        call_for(model, VECTOR, at, "down_bias", d_model, 0);
    call_for(model, CHECKSUMS, at, "bundle_crc32c", d_ff, 0);
    Array *bundles = bundles_of(model, layer);
    require(bundles != NULL, "FF-MAN-11");
    require(bundles->kind == BUNDLES, "FF-MAN-13");
    bundles->is_called_for = true;
    if (!is_null(model->manifest, "statistics")) {
        uint64_t n_window = integer_of(member(model->manifest, "statistics"), "window_tokens");
        snprintf(at, sizeof at, "layers/%llu/statistics/", layer);
        call_for(model, VECTOR, at, "firing_frequency", d_ff, 0);
        call_for(model, VECTOR, at, "aggregated_window", n_window, 0);
    }
}

static void call_for_predictor(Model *model, const Json *predictor)
{
    uint64_t d_model = integer_of(model->decoder, "d_model"), d_ff = integer_of(member(model->decoder, "ffn"), "d_ff");
    char at[64];
    snprintf(at, sizeof at, "layers/%llu/predictor/", (unsigned long long)integer_of(predictor, "layer"));
    if (is_text(member(predictor, "kind"), "low_bit_gate")) {
        call_for(model, MATRIX, at, "gate", d_ff, d_model);
        return;
    }
    call_for(model, MATRIX, at, "down", integer_of(predictor, "rank"), d_model);
    call_for(model, MATRIX, at, "up", d_ff, integer_of(predictor, "rank"));
    if (boolean_of(predictor, "bias"))
        call_for(model, VECTOR, at, "bias", d_ff, 0);
}

void open_model(Model *model, const char *path)
{
    *model = (Model){.n_arrays = 0};
    open_container(&model->container, path);
    const Entry *root = find_entry(&model->container, "zarr.json");
    const Json *document = read_document(&model->container, root);
    const Json *manifest = member(member(document, "attributes"), "flashfmt");
    require(manifest != NULL && manifest->type == OBJECT, "FF-MAN-1");
    read_manifest(model, manifest, entry_bytes(&model->container, root), (size_t)root->nbytes);
    require(is_node_type(document, "group"), "FF-ARR-1");
    check_group(document);
    read_nodes(model);
    call_for_ends(model);
    for (uint64_t layer = 0; layer < model->n_layers; layer++)
        call_for_layer(model, layer);
    for (const Json *one = member(model->manifest, "predictors")->first; one != NULL; one = one->next)
        call_for_predictor(model, one);
    for (size_t i = 0; i < model->n_arrays; i++)
        require(model->arrays[i].is_called_for, "FF-MAN-10");
}
