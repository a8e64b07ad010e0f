"""SPEC.md against the code: ids, tables, examples and the reader printed in it."""

import json
import re
import runpy
import struct
import zipfile
from itertools import pairwise
from pathlib import Path

import google_crc32c
import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashfmt
from flashfmt import layout
from flashfmt import manifest as manifest_types
from flashfmt.encodings import Encoding, decode, encode, part_layout
from flashfmt.layout import BundleGeometry
from flashfmt.manifest import Manifest, bundles_name, required_arrays
from flashfmt.manifest_rules import read_manifest
from flashfmt.rules import RULES
from flashfmt.shard_index import build_shard_index
from flashfmt.validate import metadata_checksum
from flashfmt.zarr_documents import render_documents
from flashfmt.zarr_metadata import ArrayDocument, parse_node
from flashfmt.zip_container import ZipContainer

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SPEC.md").read_text(encoding="utf-8")
SOFTWARE_FAMILIES = {"FF-RD", "FF-WR", "FF-EN"}
OBJECTS = [
    "Manifest",
    "Decoder",
    "Embedding",
    "LearnedPositions",
    "Rotary",
    "Norm",
    "Block",
    "Attention",
    "FeedForward",
    "Activation",
    "Logits",
    "Layer",
    "SpecialTokens",
    "Provenance",
    "Predictor",
    "InputTap",
    "Measured",
    "Statistics",
]


def fenced(info):
    """Text of the one code block with this info string."""
    (body,) = re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return body


def hexadecimal(name):
    """Offset of the first byte and the bytes of a hex example, whose offsets must add up."""
    lines = [line.split(";")[0].split(":") for line in fenced(f"hex {name}").splitlines()]
    rows = [(int(at, 16), bytes.fromhex(digits)) for at, digits in lines]
    for (at, raw), (following, _) in pairwise(rows):
        assert at + len(raw) == following
    return rows[0][0], b"".join(raw for _, raw in rows)


def cells(line):
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables(text):
    """Every table as a list of dicts, one a row."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *rows = block.splitlines()
        yield [dict(zip(cells(header), cells(row), strict=True)) for row in rows]


def section(title):
    """Text below a heading, up to the next one of its depth or above."""
    depth, body = re.search(rf"^(#+) (?:[\d.]+ )?{re.escape(title)}\n(.*)", TEXT, re.DOTALL | re.MULTILINE).groups()
    return re.split(rf"^#{{1,{len(depth)}}} ", body, maxsplit=1, flags=re.MULTILINE)[0]


def table(title, *columns):
    """The one table of a section that has these columns."""
    (found,) = [rows for rows in tables(section(title)) if set(columns) <= set(rows[0])]
    return found


def fields_table(name):
    """The table of one object of the manifest, which follows its heading."""
    (body,) = re.findall(rf"^#### {name}\n(.*?)^#", TEXT, re.DOTALL | re.MULTILINE)
    return next(tables(body))


def number(text):
    base, _, power = text.partition("^")
    return int(base) ** int(power or 1)


ALL_RULES = [row for rows in tables(TEXT) if "statement" in rows[0] for row in rows]


# Rules


def test_every_rule_stands_in_one_table_row():
    ids = [row["rule"] for row in ALL_RULES]
    assert len(ids) == len(set(ids))


def test_the_rules_of_models_are_those_of_the_reader():
    of_models = {row["rule"] for row in ALL_RULES if row["rule"].rpartition("-")[0] not in SOFTWARE_FAMILIES}
    assert of_models == RULES.keys()


def test_ids_in_the_text_exist():
    assert set(re.findall(r"FF-[A-Z]+-\d+", TEXT)) == {row["rule"] for row in ALL_RULES}


def test_the_text_names_each_family():
    named = set(re.findall(r"FF-[A-Z]+", " ".join(row["family"] for row in table("3. Conformance", "family"))))
    assert named == {row["rule"].rpartition("-")[0] for row in ALL_RULES}


def test_requirements_stand_in_rules_only():
    """Capitalised key words occur in rows that begin with an id, and where they are introduced."""
    loose = [
        line
        for line in TEXT.splitlines()
        if re.search(r"\b(MUST|SHOULD|MAY|SHALL|REQUIRED|RECOMMENDED)\b", line)
        and not line.startswith("| FF-")
        and not line.startswith('The key words "MUST"')
    ]
    assert loose == []
    for row in ALL_RULES:
        assert re.search(r"\b(MUST|SHOULD|MAY)\b", row["statement"]), row["rule"]


def test_rules_say_when_they_are_checked_as_the_reader_does():
    for row in ALL_RULES:
        if row["rule"] in RULES:
            late = "verify" in RULES[row["rule"]] or row["rule"].startswith("FF-IDX")
            assert row["when"] == "open" if not late else row["when"] in ("use", "verify"), row["rule"]
        else:
            assert "when" not in row


def test_sections_that_the_code_cites_exist():
    headings = {re.sub(r"^[\d.]+ ", "", title) for title in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)}
    cited = set()
    for path in [*(ROOT / "flashfmt").rglob("*.py"), *(ROOT / "reference_engine").rglob("*.py")]:
        for citation in re.findall(r"SPEC\.md,?(?: sections?)?((?:(?: and|,)? \"[^\"]+\")+)", path.read_text()):
            cited |= set(re.findall(r'"([^"]+)"', citation))
    assert cited
    assert cited <= headings


def test_links_inside_the_document_lead_somewhere():
    titles = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors
    for target in re.findall(r"\]\(((?!#|https:)[^)]+)\)", TEXT):
        assert (ROOT / target).is_file()


# Manifest


@pytest.mark.parametrize("name", OBJECTS)
def test_the_tables_of_the_manifest_are_its_types(name):
    rows = {row["field"].strip("`"): row for row in fields_table(name)}
    fields = {field.name: field for field in msgspec.structs.fields(getattr(manifest_types, name))}
    assert list(rows) == list(fields)
    for key, field in fields.items():
        if field.required:
            assert rows[key]["default"] == "required"
        else:
            stated = msgspec.convert(json.loads(rows[key]["default"].strip("`")), field.type)
            assert (type(stated), stated) == (type(field.default), field.default)


def test_every_object_of_the_manifest_has_a_table():
    structs = {
        name
        for name, value in vars(manifest_types).items()
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and not name.startswith("_")
    }
    assert structs - {"ArrayRule"} == set(OBJECTS)


def test_choices_of_the_manifest_are_complete():
    """The values of a Literal are exactly those in quotes in the type column."""
    definitions = msgspec.json.schema(Manifest)["$defs"]
    for name in OBJECTS:
        for row in fields_table(name):
            schema = definitions[name]["properties"][row["field"].strip("`")]
            assert sorted(re.findall(r'`"([^"]+)"`', row["type"])) == sorted(schema.get("enum", []))


def test_the_example_is_a_manifest(tmp_path):
    example = json.loads(fenced("json manifest"))
    assert read_manifest(example, tmp_path).decoder.d_model == 256
    jsonschema.validate(example, schema())


def schema():
    return json.loads((ROOT / "docs" / "manifest.schema.json").read_text(encoding="ascii"))


def test_the_schema_file_is_the_generated_one():
    tool = runpy.run_path(str(ROOT / "tools" / "manifest_schema.py"))
    assert (ROOT / "docs" / "manifest.schema.json").read_text(encoding="ascii") == tool["render"]()
    jsonschema.Draft202012Validator.check_schema(schema())


def test_the_schema_refuses_what_the_reader_refuses(model):
    jsonschema.validate(model.manifest, schema())
    model.manifest["decoder"]["layers"] = []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(model.manifest, schema())


# Array roles


def expected_arrays(m):
    """Arrays by the tables of section 8: name -> (shape, role)."""
    d = m.decoder
    sizes = {"d_embed": d.embedding.d_embed, "n_rows": d.positions.n_rows if d.positions else None}
    sizes |= {name: getattr(d.attention, name) for name in ("n_heads", "n_kv_heads", "head_dim")}
    sizes |= {"vocab_size": d.vocab_size, "d_model": d.d_model, "d_ff": d.ffn.d_ff, "parts": len(d.ffn.parts)}
    sizes["window_tokens"] = m.statistics.window_tokens if m.statistics else None
    once, rotary, layers, predictors, statistics = (
        rows for rows in tables(section("Array roles")) if "present when" in rows[0]
    )
    groups = [(once, d, {}), *((rotary, table, {"name": table.name}) for table in d.rotary)]
    groups += [(layers, d, {"l": layer}) for layer in range(d.n_layers)]
    groups += [(predictors, p, {"l": p.layer}) for p in m.predictors]
    groups += [(statistics, d, {"l": layer}) for layer in range(d.n_layers) if m.statistics]
    found = {}
    for rows, owner, names in groups:
        fields = {name: getattr(owner, name) for name in owner.__struct_fields__}
        for row in rows:
            condition = row["present when"].strip("`").replace("null", "None")
            if condition == "always" or eval(condition, {}, fields):
                shape = eval(row["shape"].strip("`").replace(" / ", " // "), {}, {**fields, **sizes})
                found[row["array"].strip("`").format(**names)] = (tuple(shape), row["role"])
    return found


@st.composite
def manifests(draw):
    flag = st.booleans()
    norm = st.fixed_dictionaries({"kind": st.just("layer_norm"), "eps": st.just(1e-5), "weight": flag, "bias": flag})
    order = draw(st.sampled_from(["pre_norm", "post_norm", "parallel"]))
    gated = draw(flag)
    projection = draw(flag)
    decoder = {
        "vocab_size": 48,
        "d_model": 32,
        "context_tokens": 8,
        "embedding": {"d_embed": 24 if projection else 32, "projection": projection},
        "positions": draw(st.sampled_from([None, {"n_rows": 10, "offset": 2}])),
        "rotary": draw(st.sampled_from([[], [{"name": "a", "n_dims": 4}, {"name": "b", "n_dims": 8}]])),
        "norm": draw(norm),
        "embedding_norm": draw(flag),
        "final_norm": draw(flag),
        "block": {"order": order, "shared_norm": order == "parallel" and draw(flag)},
        "attention": {
            "n_heads": 6,
            "n_kv_heads": 2,
            "head_dim": 8,
            "scale": 1,
            "qkv_bias": draw(flag),
            "output_bias": draw(flag),
            "qk_norm": draw(st.none() | norm),
            "qk_norm_over": draw(st.sampled_from(["head", "projection"])),
        },
        "ffn": {
            "kind": "gated" if gated else "plain",
            "d_ff": 40,
            "activation": {"kind": "relu"},
            "gate_bias": gated and draw(flag),
            "up_bias": draw(flag),
            "down_bias": draw(flag),
        },
        "logits": {"tied": draw(flag), "bias": draw(flag)},
        "layers": [{}, {}],
    }
    tap = {"layer": 0}
    low_rank = {"layer": 1, "kind": "low_rank", "tap": tap, "threshold": 0.5, "rank": 3, "bias": draw(flag)}
    gate = {"layer": 0, "kind": "low_bit_gate", "tap": tap, "threshold": 0}
    return {
        "version": "1.0",
        "metadata_crc32c": "00000000",
        "name": "",
        "decoder": decoder,
        "provenance": {"writer": "", "source": "", "source_format": "synthetic"},
        "predictors": draw(st.sampled_from([[], [gate], [low_rank], [low_rank, gate]])),
        "statistics": draw(st.sampled_from([None, {"n_tokens": 9, "text": "", "window_tokens": 7}])),
    }


@settings(max_examples=60, deadline=None)
@given(manifests())
def test_the_tables_of_arrays_are_what_the_reader_requires(document):
    m = read_manifest(document, Path("m"))
    expected = expected_arrays(m)
    for layer in range(m.decoder.n_layers):
        shape, role = expected.pop(bundles_name(layer))
        assert (shape, role) == ((m.decoder.ffn.d_ff, len(m.decoder.ffn.parts), m.decoder.d_model), "bundles")
    required = required_arrays(m)
    assert expected.keys() == required.keys()
    for name, rule in required.items():
        role = "matrix" if rule.encodable else "checksums" if rule.integers else "vector"
        assert expected[name] == (rule.shape, role), name


# Documents


@pytest.mark.parametrize("name", ["tensor-document", "bundles-document"])
def test_the_examples_are_array_documents(name, tmp_path):
    document = parse_node(json.loads(fenced(f"json {name}")), path=tmp_path, key=name)
    assert isinstance(document, ArrayDocument)
    assert document.chunk_grid.configuration.chunk_shape == document.shape
    ours = document.attributes.flashfmt
    n_values = ours.d_model if name == "bundles-document" else ours.shape[-1]
    assert document.shape[-1] == part_layout(ours.encoding, n_values).storage_length
    if name == "bundles-document":
        geometry = BundleGeometry.for_rows(ours.n_neurons, ours.row_nbytes)
        assert (ours.stride, ours.alignment) == (geometry.stride, geometry.alignment)


def test_the_convention_entry_is_the_one_written():
    example = msgspec.json.decode(fenced("json manifest"), type=Manifest)
    root = json.loads(render_documents(example, [], {})["zarr.json"])
    stated = json.loads(fenced("json zarr-conventions"))
    assert root["attributes"]["zarr_conventions"] == stated
    assert stated[0]["uuid"] in section("Names and identifiers")


# Containers


def test_the_example_container_is_one(tmp_path):
    start, raw = hexadecimal("container")
    path = tmp_path / "example.flash"
    path.write_bytes(raw)
    container = ZipContainer(path)
    assert start == 0
    assert {key: (e.offset, e.nbytes) for key, e in container.extents.items()} == {"zarr.json": (128, 2)}
    container.close()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("zarr.json") == b"{}"


@pytest.mark.parametrize("record", [0, 1, 2], ids=["local", "central", "end"])
def test_the_byte_tables_describe_the_example_container(record):
    """Offsets follow from sizes, and each constant is in the example at its offset."""
    _, raw = hexadecimal("container")
    rows = [rows for rows in tables(section("Single file")) if "offset" in rows[0]][record]
    start = (0, 130, 213)[record]
    names = {"N": 9, "P": 63}
    for row, following in pairwise(rows):
        assert eval(row["offset"], {}, names) + eval(row["bytes"], {}, names) == eval(following["offset"], {}, names)
    for row in rows:
        at, n = start + eval(row["offset"], {}, names), eval(row["bytes"], {}, names)
        value = row["value"].split(" (")[0]
        if value.startswith("`"):
            assert raw[at : at + n] == bytes.fromhex(value.strip("`"))
        elif re.fullmatch(r"0x[0-9a-f]+|\d+", value):
            assert int.from_bytes(raw[at : at + n], "little") == int(value, 0), row["field"]


def test_the_grammar_of_keys_is_the_one_of_the_reader():
    from flashfmt.container import KEY_PATTERN

    pattern = re.compile(section("Containers").split("```text\n")[1].split("\n")[0])
    keys = ["zarr.json", "a/b-c/d_e.f", "a//b", ".a", "a/.b", "-a", "A", "", "a/", "/a", "0/c/0", "a b", "é", "a/../b"]
    verdicts = [bool(pattern.fullmatch(key)) for key in keys]
    assert verdicts == [bool(KEY_PATTERN.fullmatch(key)) for key in keys]
    assert any(verdicts)


# Encodings, bundles


def test_q8_example():
    weights = np.zeros(64, np.float32)
    weights[[0, 1, 63]] = 1, -0.5, -127 / 64
    _, raw = hexadecimal("q8-row")
    assert encode(weights, Encoding.Q8).tobytes() == raw
    np.testing.assert_array_equal(decode(np.frombuffer(raw, np.uint8), Encoding.Q8, 64), weights)


def test_q4_example():
    weights = np.zeros(64, np.float32)
    weights[[0, 1, 2, 3, 32, 33, 63]] = 1, -0.5, 0.25, -2, 0.5, 4, -1.5
    _, raw = hexadecimal("q4-row")
    assert encode(weights, Encoding.Q4).tobytes() == raw
    np.testing.assert_array_equal(decode(np.frombuffer(raw, np.uint8), Encoding.Q4, 64), weights)


@pytest.mark.parametrize("encoding", [Encoding.F32, Encoding.F16, Encoding.BF16])
def test_plain_examples(encoding):
    assert encode(np.array([1, -0.5, 0.1, 3], np.float32), encoding).tobytes() == hexadecimal(f"{encoding}-row")[1]


def test_the_table_of_q4_rows():
    for row in table("q4", "n"):
        part = part_layout(Encoding.Q4, int(row["n"]))
        bits = part.nbytes * 8 / part.n_values
        assert [part.values_offset, part.nbytes] == [int(row["offset of values V"]), int(row["bytes of a row"])]
        assert row["bits for each weight"] == f"{bits:.2f}"


def test_the_table_of_encodings():
    rows = {row["encoding"].strip("`"): row for row in table("Encodings", "Zarr `data_type`")}
    assert set(rows) == set(Encoding)
    for name, row in rows.items():
        encoding = Encoding(name)
        assert row["Zarr `data_type`"].strip("`") == encoding.storage_dtype.name
        assert (row["holds"] == "weights") == encoding.is_weight


def test_the_example_of_bundles():
    geometry = BundleGeometry.for_rows(2, 2 * part_layout(Encoding.Q4, 64).nbytes)
    start, raw = hexadecimal("shard-index")
    assert start == geometry.index_offset
    assert raw == build_shard_index(geometry)
    assert f"= {geometry.payload_nbytes} bytes" in section("Bundles")
    assert f"{struct.unpack('<I', raw[-4:])[0]:08x}" in fenced("hex shard-index")


def test_the_table_of_geometries():
    for row in table("Geometry of common sizes", "stride"):
        part = part_layout(Encoding(row["encoding"]), int(row["d_model"]))
        geometry = BundleGeometry.for_rows(1, part.nbytes * int(row["parts"]))
        found = (part.nbytes, geometry.row_nbytes, geometry.alignment, geometry.stride)
        assert found == tuple(int(row[key]) for key in ("part_nbytes", "row_nbytes", "alignment", "stride"))


# Checksums, limits


def test_the_example_of_the_metadata_checksum():
    lines = fenced("text metadata-crc32c").splitlines()
    documents = dict(line.split(" ", 1) for line in lines[::2])
    crc = 0
    for text, stated in zip(documents.values(), lines[1::2], strict=True):
        crc = google_crc32c.extend(crc, text.encode())
        assert stated == f"  -> {crc:08x}"
    assert metadata_checksum({key: text.encode() for key, text in documents.items()}) == crc


def test_the_check_value_of_crc32c():
    assert f"`123456789` is {google_crc32c.value(b'123456789'):08x}" in TEXT


def test_the_limits_are_those_of_the_code():
    stated = {row["constant"].strip("`"): number(row["value"]) for row in table("Limits", "constant")}
    names = {name for name in vars(layout) if name.startswith("MAX_")} - {"MAX_ALIGNMENT", "MAX_PADDING_SHARE"}
    assert stated == {name: getattr(layout, name) for name in names}


# The reader of section 1


@pytest.mark.parametrize("encoding", ["f32", "f16", "bf16", "q8", "q4"])
def test_the_printed_reader_reads_models(tiny, encoding, tmp_path):
    names = {}
    exec(fenced("python"), names)
    path = tiny(encoding).write_file(tmp_path / "m.flash")
    printed = names["Flash"](path)
    with flashfmt.open(path) as model:
        for layer in range(model.decoder.n_layers):
            weights = model.bundles(layer).decode(range(model.decoder.ffn.d_ff))
            for neuron in range(model.decoder.ffn.d_ff):
                np.testing.assert_array_equal(np.float32(printed.bundle(layer, neuron)), weights[neuron])
    printed.data.close()
