"""Faults of documents and of the manifest: FF-JSON, FF-VER, FF-MAN-1 to 9, FF-PRED, FF-SUM-1 and 2, FF-LIM-3 to 5."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from generator.faults import ROOT, Fault, Mutation, in_model, set_in
from generator.hierarchy import Hierarchy

GROUP = "layers/zarr.json"
SOUND = b'{"zarr_format":3,"node_type":"group","attributes":{}}'


def faults() -> Iterator[Fault]:
    """All faults of this file."""
    yield from _json()
    yield from _versions()
    yield from _checksums()
    yield from _schema()
    yield from _relations()


def _text(text: bytes, key: str = GROUP) -> Mutation:
    return lambda h: h.edits.update({key: lambda _: text})


def _attributes(value: bytes) -> Mutation:
    return _text(SOUND.replace(b'"attributes":{}', b'"attributes":{"a":' + value + b"}"))


def _json() -> Iterator[Fault]:
    for name, rule, what, mutate in [
        ("byte-order-mark", "FF-JSON-1", "a document begins with a byte order mark", _text(b"\xef\xbb\xbf" + SOUND)),
        ("utf-16", "FF-JSON-1", "a document is UTF-16", _text(b"\xff\xfe" + SOUND.decode().encode("utf-16-le"))),
        ("latin-1", "FF-JSON-1", "a string holds the byte e9", _attributes(b'"\xe9"')),
        ("overlong-utf-8", "FF-JSON-1", "a string holds an overlong form of a slash", _attributes(b'"\xc0\xaf"')),
        ("utf-8-surrogate", "FF-JSON-1", "a string holds an encoded surrogate", _attributes(b'"\xed\xa0\x80"')),
        ("utf-8-too-large", "FF-JSON-1", "a string holds a code point above 10FFFF", _attributes(b'"\xf4\x90\x80\x80"')),
        ("trailing-comma", "FF-JSON-2", "an array ends with a comma", _attributes(b"[1,]")),
        ("single-quotes", "FF-JSON-2", "a string has single quotes", _attributes(b"'a'")),
        ("comment", "FF-JSON-2", "a document holds a comment", _attributes(b"1/**/")),
        ("leading-zero", "FF-JSON-2", "a number begins with a zero", _attributes(b"01")),
        ("plus-sign", "FF-JSON-2", "a number begins with a plus sign", _attributes(b"+1")),
        ("bare-point", "FF-JSON-2", "a number ends with its point", _attributes(b"1.")),
        ("control-character", "FF-JSON-2", "a string holds a line feed", _attributes(b'"\n"')),
        ("unknown-escape", "FF-JSON-2", "a string holds the escape \\x", _attributes(b'"\\x41"')),
        ("text-after-document", "FF-JSON-2", "something follows a document", _text(SOUND + b"{}")),
        ("nul-after-document", "FF-JSON-2", "a NUL follows a document", _text(SOUND + b"\0")),
        ("document-cut-short", "FF-JSON-2", "the last brace of a document is missing", _text(SOUND[:-1])),
        ("document-empty", "FF-JSON-2", "a document has no bytes", _text(b"")),
        ("repeated-key", "FF-JSON-3", "an object repeats a key", _attributes(b'{"a":1,"a":1}')),
        ("repeated-key-escaped", "FF-JSON-3", "an object repeats a key as an escape", _attributes(b'{"a":1,"\\u0061":1}')),
        ("number-nan", ["FF-JSON-4", "FF-JSON-2"], "a number is NaN", _attributes(b"NaN")),
        ("number-infinity", ["FF-JSON-4", "FF-JSON-2"], "a number is -Infinity", _attributes(b"-Infinity")),
        ("number-too-large", "FF-JSON-4", "a number is 1e400", _attributes(b"1e400")),
        ("integer-of-65-bits", "FF-JSON-4", "an integer is 2^64", _attributes(b"18446744073709551616")),
        ("integer-too-small", "FF-JSON-4", "an integer is -2^63 - 1", _attributes(b"-9223372036854775809")),
        ("document-is-array", "FF-JSON-5", "the top level of a document is an array", _text(b"[]")),
        ("document-is-null", "FF-JSON-5", "the top level of a document is null", _text(b"null")),
        ("lone-surrogate", "FF-JSON-6", "a string holds half of a surrogate pair", _attributes(b'"\\ud83d"')),
        ("reversed-surrogates", "FF-JSON-6", "a surrogate pair is reversed", _attributes(b'"\\ude00\\ud83d"')),
        ("lone-surrogate-in-key", "FF-JSON-6", "a key holds half of a surrogate pair", _attributes(b'{"\\udc00":1}')),
        ("document-too-large", "FF-LIM-3", "a document has 2^20 + 1 bytes", _text(SOUND.ljust((1 << 20) + 1))),
        ("nesting-33-deep", "FF-LIM-4", "a document nests 33 deep", _attributes(b"[" * 31 + b"]" * 31)),
    ]:  # fmt: skip
        yield in_model(name, rule, what, mutate)


def _manifest(path: str, value: Any) -> Mutation:
    return lambda h: set_in(h.manifest, path, value)


def _without(path: str) -> Mutation:
    def mutate(h: Hierarchy) -> None:
        *parents, last = path.split(".")
        target: Any = h.manifest
        for segment in parents:
            target = target[segment]
        del target[last]

    return mutate


def _versions() -> Iterator[Fault]:
    def version_2(h: Hierarchy) -> None:
        h.documents[""]["attributes"]["flashfmt"] = {"version": "2.0", "decoder": "elsewhere"}

    def future_feature(h: Hierarchy) -> None:
        h.manifest["required_features"] = ["x_of_the_future"]
        set_in(h.manifest, "decoder.ffn.activation.kind", "of_the_future")

    for name, rule, what, mutate in [
        ("major-version-2", "FF-VER-1", "a manifest of version 2, all else unknown", version_2),
        ("major-version-0", "FF-VER-1", "the version is 0.9", _manifest("version", "0.9")),
        ("required-feature", "FF-VER-2", "a required feature is unknown, and so is what it allows", future_feature),
    ]:
        yield in_model(name, rule, what, mutate)
    for name, value in [
        ("version-without-minor", "1"),
        ("version-with-patch", "1.0.0"),
        ("version-with-leading-zero", "01.0"),
        ("version-is-number", 1.0),
        ("version-with-line-feed", "1.0\n"),
        ("version-of-other-digits", "\u0661.0"),
    ]:
        yield in_model(name, "FF-VER-3", f"the version is {value!a}", _manifest("version", value))
    yield in_model("version-missing", ["FF-VER-3", "FF-MAN-2"], "there is no version", _without("version"))

    def no_manifest(h: Hierarchy) -> None:
        del h.documents[""]["attributes"]["flashfmt"]

    def manifest_text(h: Hierarchy) -> None:
        h.documents[""]["attributes"]["flashfmt"] = "1.0"

    yield in_model("no-manifest", "FF-MAN-1", "the root has no attribute flashfmt", no_manifest)
    yield in_model("manifest-is-text", "FF-MAN-1", "the attribute flashfmt is a string", manifest_text)


def _checksums() -> Iterator[Fault]:
    def other(h: Hierarchy) -> None:
        h.crc_mask = 1

    def twice(h: Hierarchy) -> None:
        h.documents[""]["attributes"]["other"] = {"metadata_crc32c": "00000000"}

    def spaced(h: Hierarchy) -> None:
        h.edits[ROOT] = lambda text: text.replace(b'"metadata_crc32c":"', b'"metadata_crc32c": "')

    yield in_model("metadata-checksum", "FF-SUM-1", "metadata_crc32c has one wrong bit", other)
    yield in_model("checksum-field-twice", "FF-SUM-2", "the text of the field occurs in another object too", twice)
    yield in_model("checksum-field-spaced", "FF-SUM-2", "a space follows the colon of the field", spaced)


def _schema() -> Iterator[Fault]:
    d = "decoder"
    for name, what, mutate, on in [
        ("field-missing", "decoder.vocab_size is missing", _without(f"{d}.vocab_size"), "minimal"),
        ("null-for-object", "decoder.norm is null", _manifest(f"{d}.norm", None), "minimal"),
        ("null-for-text", "provenance.architecture is null", _manifest("provenance.architecture", None), "minimal"),
        ("boolean-for-integer", "tokens.bos is true", _manifest("tokens", {"bos": True}), "minimal"),
        ("boolean-for-number", "norm.eps is true", _manifest(f"{d}.norm.eps", True), "minimal"),
        ("integer-for-boolean", "logits.tied is 1", _manifest(f"{d}.logits.tied", 1), "minimal"),
        ("text-for-number", "norm.eps is '1'", _manifest(f"{d}.norm.eps", "1"), "minimal"),
        ("point-in-integer", "context_tokens is 32.0", _manifest(f"{d}.context_tokens", 32.0), "minimal"),
        ("count-zero", "context_tokens is 0", _manifest(f"{d}.context_tokens", 0), "minimal"),
        ("count-above-2-to-31", "context_tokens is 2^31 + 1", _manifest(f"{d}.context_tokens", 2**31 + 1), "minimal"),
        ("negative-id", "an eos token is -1", _manifest("tokens", {"eos": [-1]}), "minimal"),
        ("eps-zero", "norm.eps is 0", _manifest(f"{d}.norm.eps", 0), "minimal"),
        ("scale-negative", "attention.scale is negative", _manifest(f"{d}.attention.scale", -0.5), "minimal"),
        ("unknown-activation", "an activation is called tanh", _manifest(f"{d}.ffn.activation.kind", "tanh"), "minimal"),
        ("activation-with-capital", "an activation is called ReLU", _manifest(f"{d}.ffn.activation.kind", "ReLU"), "minimal"),
        ("no-layers", "there are no layers", _manifest(f"{d}.layers", []), "minimal"),
        ("layers-is-number", "layers is 1", _manifest(f"{d}.layers", 1), "minimal"),
        ("odd-rotary-dimensions", "a rotary table turns 3 dimensions", _manifest(f"{d}.rotary.0.n_dims", 3), "rich"),
        ("rotary-name-with-capital", "a rotary table is called Main", _rename_table("Main"), "rich"),
        ("feature-with-line-feed", "a feature's name ends with a line feed", _manifest("optional_features", ["a\n"]), "minimal"),
        ("too-many-features", "65 optional features", _manifest("optional_features", ["a"] * 65), "minimal"),
        ("name-too-long", "the name has 4097 characters", _manifest("name", "a" * 4097), "minimal"),
        ("digest-with-capitals", "source_sha256 has capitals", _manifest("provenance.source_sha256", "A" * 64), "minimal"),
        ("recall-above-1", "a measured recall is 1.5", _measured("recall", 1.5), "rich"),
        ("perplexity-ratio-0", "a measured ratio of perplexities is 0", _measured("perplexity_ratio", 0), "rich"),
        ("offset-too-large", "positions.offset is 65537", _manifest(f"{d}.positions.offset", 65537), "rich"),
    ]:  # fmt: skip
        also = ["FF-MAN-2", "FF-MAN-8"] if name == "offset-too-large" else ["FF-MAN-2"]
        yield in_model(f"manifest-{name}", also, what, mutate, on)


def _rename_table(name: str) -> Mutation:
    def mutate(h: Hierarchy) -> None:
        set_in(h.manifest, "decoder.rotary.0.name", name)
        set_in(h.manifest, "decoder.layers.0.rotary", None)

    return mutate


def _measured(field: str, value: float) -> Mutation:
    def mutate(h: Hierarchy) -> None:
        measured = {"recall": 1, "precision": 1, "predicted_fraction": 0.5, "n_tokens": 1, "text": "a text"}
        h.manifest["predictors"][0]["measured"] = measured | {field: value}

    return mutate


def _relations() -> Iterator[Fault]:
    def second_table(h: Hierarchy) -> None:
        tables = h.manifest["decoder"]["rotary"]
        tables.append(dict(tables[0]))

    def predictor(**fields: Any) -> Callable[[Hierarchy], None]:
        return lambda h: h.manifest["predictors"][0].update(fields)

    def two_predictors(h: Hierarchy) -> None:
        h.manifest["predictors"].append(dict(h.manifest["predictors"][0]))

    def gate_with(**fields: Any) -> Callable[[Hierarchy], None]:
        return predictor(kind="low_bit_gate", **({"rank": None} | fields))

    def heads(h: Hierarchy) -> None:
        h.manifest["decoder"]["attention"] |= {"n_heads": 3, "n_kv_heads": 2}

    d = "decoder"
    for name, rule, what, mutate, on in [
        ("rotary-name-twice", "FF-MAN-3", "two rotary tables have one name", second_table, "rich"),
        ("rotary-unknown", "FF-MAN-3", "a layer names no rotary table", _manifest(f"{d}.layers.1.rotary", "local"), "rich"),
        ("heads-not-shared-evenly", "FF-MAN-4", "3 query heads share 2", heads, "minimal"),
        ("rotary-wider-than-head", "FF-MAN-5", "a rotary table turns 6 of 4 dimensions", _manifest(f"{d}.rotary.0.n_dims", 6), "rich"),
        ("projection-missing", "FF-MAN-6", "d_embed is not d_model, without projection", _manifest(f"{d}.embedding.d_embed", 8), "minimal"),
        ("projection-needless", "FF-MAN-6", "a projection between equal widths", _manifest(f"{d}.embedding.projection", True), "minimal"),
        ("bos-outside-vocabulary", "FF-MAN-7", "bos is vocab_size", _manifest("tokens", {"bos": 8}), "minimal"),
        ("eos-outside-vocabulary", "FF-MAN-7", "the second eos is vocab_size", _manifest("tokens", {"eos": [0, 8]}), "minimal"),
        ("too-few-positions", "FF-MAN-8", "one learned position too few", _manifest(f"{d}.context_tokens", 33), "rich"),
        ("shared-norm-in-sequence", "FF-MAN-9", "a shared norm in pre_norm order", _manifest(f"{d}.block", {"shared_norm": True}), "minimal"),
        ("gate-bias-without-gate", "FF-MAN-9", "a gate bias in a plain FFN", _manifest(f"{d}.ffn.gate_bias", True), "minimal"),
        ("predictor-of-no-layer", "FF-PRED-1", "a predictor belongs to layer 2 of 2", predictor(layer=2), "rich"),
        ("two-predictors", "FF-PRED-1", "a layer has two predictors", two_predictors, "rich"),
        ("tap-in-later-layer", "FF-PRED-2", "a predictor of layer 0 taps layer 1", predictor(tap={"layer": 1}), "rich"),
        ("low-rank-without-rank", "FF-PRED-3", "a low_rank predictor has no rank", predictor(rank=None), "rich"),
        ("gate-with-rank", "FF-PRED-3", "a low_bit_gate has a rank", gate_with(rank=2), "rich"),
        ("gate-with-bias", "FF-PRED-3", "a low_bit_gate has a bias", gate_with(bias=True), "rich"),
        ("threshold-above-1", "FF-PRED-4", "the threshold of a low_rank predictor is 1.5", predictor(threshold=1.5), "rich"),
        ("threshold-negative", "FF-PRED-4", "the threshold of a low_rank predictor is -0.1", predictor(threshold=-0.1), "rich"),
        ("too-many-neurons", "FF-LIM-5", "d_ff is 2^24 + 1", _manifest(f"{d}.ffn.d_ff", 2**24 + 1), "minimal"),
    ]:  # fmt: skip
        yield in_model(name, rule, what, mutate, on)
