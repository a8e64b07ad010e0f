"""diff: equal models have no differences however they are stored; every change is found and measured."""

import numpy as np
import pytest

import flashfmt
import flashfmt.diff
import flashfmt.output
from flashfmt.diff import compared_nbytes, differences


@pytest.fixture
def compare(model, tiny, tmp_path):
    """A function: differences between the small model and one that `change` was made to."""

    def run(change=lambda other: None, **options):
        other = tiny(**options)
        change(other)
        first, second = model.write_file(tmp_path / "a.flash"), other.write_directory(tmp_path / "b")
        with flashfmt.open(first) as a, flashfmt.open(second) as b:
            seen = []
            found = list(differences(a, b, seen.append))
            assert sum(seen) == compared_nbytes(a, b)
            return found

    return run


@pytest.mark.parametrize("block_nbytes", [1, 1000, 8 << 20])
def test_equal_models(compare, monkeypatch, block_nbytes):
    monkeypatch.setattr(flashfmt.diff, "BLOCK_NBYTES", block_nbytes)
    assert compare() == []


def test_storage_does_not_count(source, tmp_path, writing, monkeypatch):
    monkeypatch.setattr(flashfmt.output, "fsync", lambda _: None)
    writing.copy(source, tmp_path / "m", codec="zstd")
    with flashfmt.open(tmp_path / "m") as other:
        assert list(differences(source, other)) == []


def test_the_manifest(compare):
    def change(other):
        other.manifest["name"] = "other"
        other.manifest["tokens"]["eos"] = [2, 3]

    found = {d.where: (d.kind, d.first, d.second) for d in compare(change)}
    assert found == {"name": ("manifest", "tiny", "other"), "tokens.eos[1]": ("manifest", "nothing", "3")}


def test_arrays_on_one_side(compare):
    def change(other):
        other.vector("extensions/x", 3)
        del other.arrays["files/tokenizer"]

    assert [(d.kind, d.where) for d in compare(change)] == [("missing", "files/tokenizer"), ("extra", "extensions/x")]


def test_a_file(compare):
    (found,) = compare(lambda other: other.add_file("tokenizer", "tokenizer.json", b"{}"))
    assert (found.kind, found.where) == ("file", "files/tokenizer")


def test_one_weight(compare, model):
    name, at = "embedding/tokens", 100
    weights = np.frombuffer(model.arrays[name].payload, "<f2").astype(np.float64)
    changed = np.float16(weights[at] + 1)

    (found,) = compare(lambda other: other.edit_payload(name, 2 * at, changed.tobytes()))
    assert (found.kind, found.where, found.n_different, found.n_values) == ("values", name, 1, 32 * 64)
    assert found.max_abs == pytest.approx(abs(float(changed) - weights[at]))
    assert found.relative == pytest.approx(found.max_abs / np.linalg.norm(weights))


def test_one_bundle(compare):
    def change(other):
        rows = other.rows(1)
        rows[4] = np.float16(2).tobytes() + rows[4][2:]
        other.set_bundles(1, rows)

    (found,) = compare(change)
    assert (found.kind, found.where, found.n_different) == ("values", "layers/1/ffn/bundles", 1)


def test_the_sign_of_zero(compare, model):
    model.edit_payload("final_norm/weight", 0, np.float32(0).tobytes())

    (found,) = compare(lambda other: other.edit_payload("final_norm/weight", 0, np.float32(-0.0).tobytes()))
    assert (found.where, found.n_different, found.max_abs) == ("final_norm/weight", 0, 0.0)


def test_an_alignment_does_not_count(compare):
    assert compare(lambda other: other.set_bundles(0, other.rows(0), alignment=4096)) == []


def test_the_weights_of_another_encoding_are_compared(source, tmp_path, writing, monkeypatch):
    monkeypatch.setattr(flashfmt.output, "fsync", lambda _: None)
    declaration = writing.declaration(source)
    specs = {s.name: s for s in declaration["tensors"]}
    exact = flashfmt.TensorSpec("embedding/tokens", flashfmt.Encoding.F32, (32, 64))
    specs["embedding/tokens"] = exact
    rounded = flashfmt.TensorSpec("logits/weight", flashfmt.Encoding.Q8, (32, 64))
    specs["logits/weight"] = rounded
    declaration["tensors"] = list(specs.values())
    with flashfmt.FlashWriter(tmp_path / "m", **declaration, fingerprint="") as writer:
        for spec in (exact, rounded):
            weights = source.tensor(spec.name).decode()
            writer.write_tensor(spec.name, flashfmt.encodings.encode(weights, spec.encoding))
        for name in specs.keys() - {exact.name, rounded.name}:
            writer.write_tensor(name, source.tensor(name).data)
        for role in source.files:
            writer.write_file(role, source.file(role))
        for layer in range(2):
            writing.fill_bundles(writer, source, layer)
    with flashfmt.open(tmp_path / "m") as other:
        found = [(d.kind, d.where) for d in differences(source, other)]
        assert sorted(found) == [("encoding", exact.name), ("encoding", rounded.name), ("values", rounded.name)]
        (values,) = (d for d in differences(source, other) if d.kind == "values")
        assert 0 < values.relative < 0.01
