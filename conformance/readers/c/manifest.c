/* The manifest: its schema as a table, its defaults, and what relates its fields (SPEC sections 7, 13, 14, 17, 18). */
#include "reader.h"

#include <stdlib.h>
#include <string.h>

#define MAX_COUNT ((uint64_t)1 << 31)
#define MAX_NEURONS ((uint64_t)1 << 24)

/* ---- the schema of the manifest ---- */

/*
 * Section 7 as a table, the fields of each object in alphabetical order. Types: the name of an object, a word that
 * `complete_scalar` knows, one with bounds ("id:0:65536"), or a choice ("a|b"); "?": or null; "[least:most:type]": a list.
 * `absent` is the default as JSON, NULL where the field is required.
 */
static const struct {
    const char *object, *field, *type, *absent;
} SCHEMA[] = {
    {"Manifest", "decoder", "Decoder", NULL},
    {"Manifest", "metadata_crc32c", "hex:8", NULL},
    {"Manifest", "name", "text", NULL},
    {"Manifest", "optional_features", "[0:64:name]", "[]"},
    {"Manifest", "predictors", "[0:10000:Predictor]", "[]"},
    {"Manifest", "provenance", "Provenance", NULL},
    {"Manifest", "required_features", "[0:64:name]", "[]"},
    {"Manifest", "statistics", "Statistics?", "null"},
    {"Manifest", "tokens", "SpecialTokens", "{}"},
    {"Manifest", "version", "text", NULL},
    {"Decoder", "attention", "Attention", NULL},
    {"Decoder", "block", "Block", "{}"},
    {"Decoder", "context_tokens", "count", NULL},
    {"Decoder", "d_model", "count", NULL},
    {"Decoder", "embedding", "Embedding", NULL},
    {"Decoder", "embedding_norm", "boolean", "false"},
    {"Decoder", "ffn", "FeedForward", NULL},
    {"Decoder", "final_norm", "boolean", "true"},
    {"Decoder", "layers", "[1:10000:Layer]", NULL},
    {"Decoder", "logits", "Logits", NULL},
    {"Decoder", "norm", "Norm", NULL},
    {"Decoder", "positions", "LearnedPositions?", "null"},
    {"Decoder", "rotary", "[0:16:Rotary]", "[]"},
    {"Decoder", "vocab_size", "count", NULL},
    {"Embedding", "d_embed", "count", NULL},
    {"Embedding", "projection", "boolean", "false"},
    {"Embedding", "scale", "number", "1.0"},
    {"LearnedPositions", "n_rows", "count", NULL},
    {"LearnedPositions", "offset", "id:0:65536", "0"},
    {"Rotary", "attention_factor", "number", "1.0"},
    {"Rotary", "n_dims", "even:2:65536", NULL},
    {"Rotary", "name", "name", NULL},
    {"Rotary", "pairing", "half|interleaved", "\"half\""},
    {"Norm", "bias", "boolean", "false"},
    {"Norm", "eps", "positive", NULL},
    {"Norm", "kind", "layer_norm|rms_norm", NULL},
    {"Norm", "weight", "boolean", "true"},
    {"Norm", "weight_offset", "number", "0.0"},
    {"Block", "order", "pre_norm|post_norm|parallel", "\"pre_norm\""},
    {"Block", "shared_norm", "boolean", "false"},
    {"Attention", "head_dim", "count", NULL},
    {"Attention", "n_heads", "count", NULL},
    {"Attention", "n_kv_heads", "count", NULL},
    {"Attention", "output_bias", "boolean", "false"},
    {"Attention", "qk_norm", "Norm?", "null"},
    {"Attention", "qk_norm_over", "head|projection", "\"head\""},
    {"Attention", "qkv_bias", "boolean", "false"},
    {"Attention", "scale", "positive", NULL},
    {"FeedForward", "activation", "Activation", NULL},
    {"FeedForward", "d_ff", "count", NULL},
    {"FeedForward", "down_bias", "boolean", "false"},
    {"FeedForward", "gate_bias", "boolean", "false"},
    {"FeedForward", "kind", "plain|gated", NULL},
    {"FeedForward", "up_activation", "Activation", "{\"kind\":\"identity\"}"},
    {"FeedForward", "up_bias", "boolean", "false"},
    {"Activation", "kind", "identity|relu|relu2|fatrelu|silu|gelu|gelu_tanh|quick_gelu", NULL},
    {"Activation", "threshold", "number", "0.0"},
    {"Logits", "bias", "boolean", "false"},
    {"Logits", "scale", "number", "1.0"},
    {"Logits", "softcap", "positive?", "null"},
    {"Logits", "tied", "boolean", NULL},
    {"Layer", "attention_window_tokens", "count?", "null"},
    {"Layer", "rotary", "name?", "null"},
    {"SpecialTokens", "add_bos", "boolean", "false"},
    {"SpecialTokens", "bos", "id?", "null"},
    {"SpecialTokens", "eos", "[0:64:id]", "[]"},
    {"Provenance", "architecture", "text", "\"\""},
    {"Provenance", "licence", "text?", "null"},
    {"Provenance", "source", "text", NULL},
    {"Provenance", "source_format", "safetensors|gguf|synthetic|flash", NULL},
    {"Provenance", "source_sha256", "hex:64?", "null"},
    {"Provenance", "writer", "text", NULL},
    {"Predictor", "bias", "boolean", "false"},
    {"Predictor", "kind", "low_rank|low_bit_gate", NULL},
    {"Predictor", "layer", "id", NULL},
    {"Predictor", "measured", "Measured?", "null"},
    {"Predictor", "rank", "count?", "null"},
    {"Predictor", "signed", "boolean", "true"},
    {"Predictor", "tap", "InputTap", NULL},
    {"Predictor", "threshold", "number", NULL},
    {"InputTap", "layer", "id", NULL},
    {"InputTap", "point", "ffn_input|attention_input|attention_output", "\"ffn_input\""},
    {"Measured", "n_tokens", "count", NULL},
    {"Measured", "perplexity_ratio", "positive?", "null"},
    {"Measured", "precision", "share", NULL},
    {"Measured", "predicted_fraction", "share", NULL},
    {"Measured", "recall", "share", NULL},
    {"Measured", "text", "text", NULL},
    {"Statistics", "n_tokens", "count", NULL},
    {"Statistics", "text", "text", NULL},
    {"Statistics", "window_tokens", "count", NULL},
};

static Json *complete(const Json *value, const char *type, size_t n_type);

/* Whether `text` is one of the words between the bars of `choice`. */
bool is_choice(const Json *text, const char *choice, size_t n_choice)
{
    for (const char *word = choice, *end = choice + n_choice; word < end;) {
        const char *bar = memchr(word, '|', (size_t)(end - word));
        size_t n = (size_t)((bar == NULL ? end : bar) - word);
        if (text->nbytes == n && memcmp(text->text, word, n) == 0)
            return true;
        word += n + 1;
    }
    return false;
}

bool is_hex(const Json *value, size_t n)
{
    return value != NULL && value->type == TEXT && value->nbytes == n && strspn(value->text, "0123456789abcdef") == n;
}

bool is_name(const Json *value)
{
    return value != NULL && value->type == TEXT && value->nbytes >= 1 && value->nbytes <= 64 && value->text[0] >= 'a' &&
           value->text[0] <= 'z' && strspn(value->text, "abcdefghijklmnopqrstuvwxyz0123456789_") == value->nbytes;
}

static size_t n_characters(const Json *text)
{
    size_t n = 0;
    for (size_t i = 0; i < text->nbytes; i++)
        n += ((uint8_t)text->text[i] & 0xc0) != 0x80;
    return n;
}

/* A copy of a value that is neither list nor object; all numbers that are not integers by type become REAL. */
static Json *complete_scalar(const Json *value, const char *type)
{
    Json *copy = take(sizeof *copy);
    *copy = *value;
    bool is_number = value->type == INTEGER || value->type == REAL, holds;
    bool is_real = true;
    unsigned long long least = 0, most = 0;
    if (strcmp(type, "number") == 0) {
        holds = is_number;
    } else if (strcmp(type, "positive") == 0) {
        holds = is_number && value->real > 0;
    } else if (strcmp(type, "share") == 0) {
        holds = is_number && value->real >= 0 && value->real <= 1;
    } else {
        is_real = false;
        if (strcmp(type, "count") == 0)
            holds = is_integer(value, 1, MAX_COUNT);
        else if (strcmp(type, "id") == 0)
            holds = is_integer(value, 0, UINT64_MAX);
        else if (sscanf(type, "id:%llu:%llu", &least, &most) == 2)
            holds = is_integer(value, least, most);
        else if (sscanf(type, "even:%llu:%llu", &least, &most) == 2)
            holds = is_integer(value, least, most) && value->magnitude % 2 == 0;
        else if (strcmp(type, "boolean") == 0)
            holds = value->type == BOOLEAN;
        else if (strcmp(type, "text") == 0)
            holds = value->type == TEXT && n_characters(value) <= 4096;
        else if (strcmp(type, "name") == 0)
            holds = is_name(value);
        else if (sscanf(type, "hex:%llu", &least) == 1)
            holds = is_hex(value, (size_t)least);
        else
            holds = value->type == TEXT && is_choice(value, type, strlen(type));
    }
    require(holds, "FF-MAN-2");
    if (is_real)
        copy->type = REAL;
    else if (copy->type == INTEGER)
        copy->negative = false; /* of -0 */
    return copy;
}

static Json *complete_object(const Json *value, const char *object)
{
    Json *copy = take(sizeof *copy), **to = &copy->first;
    require(value->type == OBJECT, "FF-MAN-2");
    copy->type = OBJECT;
    for (size_t i = 0; i < sizeof SCHEMA / sizeof *SCHEMA; i++) {
        if (strcmp(SCHEMA[i].object, object) != 0)
            continue;
        const Json *one = member(value, SCHEMA[i].field), absent = {.type = NOTHING};
        if (one == NULL) {
            const char *text = SCHEMA[i].absent;
            require(text != NULL, "FF-MAN-2");
            if (strcmp(text, "null") == 0) {
                one = &absent;
            } else {
                char wrapped[64];
                int n = snprintf(wrapped, sizeof wrapped, "{\"is\":%s}", text);
                one = member(parse_json((const uint8_t *)wrapped, (size_t)n), "is");
            }
        }
        *to = complete(one, SCHEMA[i].type, strlen(SCHEMA[i].type));
        (*to)->key = SCHEMA[i].field;
        (*to)->key_nbytes = strlen(SCHEMA[i].field);
        (*to)->next = NULL;
        to = &(*to)->next;
        copy->n++;
    }
    return copy;
}

static Json *complete_list(const Json *value, const char *type)
{
    unsigned long long least, most;
    int at = 0;
    Json *copy = take(sizeof *copy), **to = &copy->first;
    sscanf(type, "[%llu:%llu:%n", &least, &most, &at);
    require(value->type == LIST && value->n >= least && value->n <= most, "FF-MAN-2");
    copy->type = LIST;
    copy->n = value->n;
    for (const Json *one = value->first; one != NULL; one = one->next, to = &(*to)->next) {
        *to = complete(one, type + at, strlen(type + at) - 1);
        (*to)->next = NULL;
    }
    return copy;
}

/* Check a value against a type (FF-MAN-2); returns a copy with all defaults filled in, and unknown fields left out. */
static Json *complete(const Json *value, const char *type, size_t n_type)
{
    char word[96];
    snprintf(word, sizeof word, "%.*s", (int)n_type, type);
    size_t n = strlen(word);
    if (word[n - 1] == '?') {
        word[n - 1] = 0;
        if (value->type == NOTHING)
            return take(sizeof(Json));
    }
    if (word[0] == '[')
        return complete_list(value, word);
    return word[0] >= 'A' && word[0] <= 'Z' ? complete_object(value, word) : complete_scalar(value, word);
}

uint64_t integer_of(const Json *object, const char *key)
{
    return member(object, key)->magnitude;
}

bool boolean_of(const Json *object, const char *key)
{
    return member(object, key)->magnitude != 0;
}

bool is_null(const Json *object, const char *key)
{
    return member(object, key)->type == NOTHING;
}

static bool same_text(const Json *a, const Json *b)
{
    return a->nbytes == b->nbytes && memcmp(a->text, b->text, a->nbytes) == 0;
}

/* ---- the manifest ---- */

static void check_version(const Json *version)
{
    require(version != NULL && version->type == TEXT, "FF-VER-3");
    const char *at = version->text;
    for (int i = 0; i < 2; i++) {
        size_t n = strspn(at, "0123456789");
        require(n >= 1 && n <= 4 && (n == 1 || *at != '0'), "FF-VER-3");
        at += n;
        require(i == 1 || *at++ == '.', "FF-VER-3");
    }
    require(at == version->text + version->nbytes, "FF-VER-3");
    require(strncmp(version->text, "1.", 2) == 0, "FF-VER-1");
}

/* Version, checksum of the documents, features: what comes before the schema. */
static void check_manifest_can_be_read(const Container *container, const Json *manifest, const uint8_t *root, size_t n_root)
{
    static const char field[] = "\"metadata_crc32c\":\"";
    const size_t n_field = sizeof field - 1;
    check_version(member(manifest, "version"));

    size_t at = 0, n_found = 0;
    for (size_t i = 0; i + n_field <= n_root; i++)
        if (memcmp(root + i, field, n_field) == 0)
            at = i + n_field, n_found++;
    require(n_found == 1, "FF-SUM-2");
    require(n_root - at >= 8, "FF-SUM-1");
    uint32_t crc = 0;
    for (size_t i = 0; i < container->n_entries; i++) {
        const Entry *entry = &container->entries[i];
        if (!entry->is_document || strcmp(entry->key, "zarr.json") == 0)
            continue;
        require(entry->nbytes <= MAX_DOCUMENT_BYTES, "FF-LIM-3");
        void *before = mark();
        crc = crc32c(crc, entry_bytes(container, entry), entry->nbytes);
        release(before);
    }
    crc = crc32c(crc, root, at);
    crc = crc32c(crc, (const uint8_t *)"00000000", 8);
    crc = crc32c(crc, root + at + 8, n_root - at - 8);
    const Json *stated = member(manifest, "metadata_crc32c");
    require(is_hex(stated, 8) && same_crc((uint32_t)strtoul(stated->text, NULL, 16), crc), "FF-SUM-1");

    const Json *features = member(manifest, "required_features");
    if (features != NULL && features->type == LIST)
        for (const Json *feature = features->first; feature != NULL; feature = feature->next)
            require(feature->type != TEXT, "FF-VER-2"); /* this reader knows none */
}

static void check_rotary(const Json *decoder)
{
    const Json *tables = member(decoder, "rotary");
    uint64_t head_dim = integer_of(member(decoder, "attention"), "head_dim");
    for (const Json *table = tables->first; table != NULL; table = table->next) {
        for (const Json *other = table->next; other != NULL; other = other->next)
            require(!same_text(member(table, "name"), member(other, "name")), "FF-MAN-3");
        require(integer_of(table, "n_dims") <= head_dim, "FF-MAN-5");
    }
    for (const Json *layer = member(decoder, "layers")->first; layer != NULL; layer = layer->next) {
        bool is_known = is_null(layer, "rotary");
        for (const Json *table = tables->first; table != NULL && !is_known; table = table->next)
            is_known = same_text(member(layer, "rotary"), member(table, "name"));
        require(is_known, "FF-MAN-3");
    }
}

static void check_predictors(const Model *model)
{
    bool *is_predicted = take((size_t)model->n_layers);
    for (const Json *one = member(model->manifest, "predictors")->first; one != NULL; one = one->next) {
        uint64_t layer = integer_of(one, "layer");
        double threshold = member(one, "threshold")->real;
        require(layer < model->n_layers && !is_predicted[layer], "FF-PRED-1");
        is_predicted[layer] = true;
        require(integer_of(member(one, "tap"), "layer") <= layer, "FF-PRED-2");
        if (is_text(member(one, "kind"), "low_rank")) {
            require(!is_null(one, "rank"), "FF-PRED-3");
            require(threshold >= 0 && threshold <= 1, "FF-PRED-4");
        } else {
            require(is_null(one, "rank") && !boolean_of(one, "bias"), "FF-PRED-3");
        }
    }
}

static void check_relations(const Model *model)
{
    const Json *d = model->decoder, *attention = member(d, "attention"), *embedding = member(d, "embedding");
    const Json *ffn = member(d, "ffn"), *block = member(d, "block"), *tokens = member(model->manifest, "tokens");
    uint64_t vocab_size = integer_of(d, "vocab_size");
    require(integer_of(ffn, "d_ff") <= MAX_NEURONS, "FF-LIM-5");
    check_rotary(d);
    require(integer_of(attention, "n_heads") % integer_of(attention, "n_kv_heads") == 0, "FF-MAN-4");
    bool differs = integer_of(embedding, "d_embed") != integer_of(d, "d_model");
    require(boolean_of(embedding, "projection") == differs, "FF-MAN-6");
    require(is_null(tokens, "bos") || integer_of(tokens, "bos") < vocab_size, "FF-MAN-7");
    for (const Json *token = member(tokens, "eos")->first; token != NULL; token = token->next)
        require(token->magnitude < vocab_size, "FF-MAN-7");
    if (!is_null(d, "positions")) {
        const Json *positions = member(d, "positions");
        uint64_t n_positions = integer_of(d, "context_tokens") + integer_of(positions, "offset");
        require(n_positions <= integer_of(positions, "n_rows"), "FF-MAN-8");
    }
    require(!boolean_of(block, "shared_norm") || is_text(member(block, "order"), "parallel"), "FF-MAN-9");
    require(!boolean_of(ffn, "gate_bias") || is_text(member(ffn, "kind"), "gated"), "FF-MAN-9");
    check_predictors(model);
}

void read_manifest(Model *model, const Json *manifest, const uint8_t *root, size_t n_root)
{
    check_manifest_can_be_read(&model->container, manifest, root, n_root);
    model->manifest = complete(manifest, "Manifest", strlen("Manifest"));
    model->decoder = member(model->manifest, "decoder");
    model->n_layers = member(model->decoder, "layers")->n;
    check_relations(model);
}
