"""The report of a sparse model: how the text is divided, what is counted, and one report of a tiny model."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import flashfmt


@pytest.fixture(scope="module")
def sparse_report():
    path = Path(__file__).parents[2] / "benchmarks" / "sparse_report.py"
    spec = importlib.util.spec_from_file_location("sparse_report", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_no_document_lies_on_both_sides(sparse_report):
    rng = np.random.default_rng(0)
    parts = [[document] * int(n) for document, n in enumerate(rng.integers(1, 900, 40))]
    ids = sparse_report.in_parts(parts, 0.2)
    cut = round(0.8 * len(ids))
    assert sorted(ids) == sorted(token for part in parts for token in part)
    shared = set(ids[:cut]) & set(ids[cut:])
    assert len(shared) <= 1  # where the sides do not divide to the token
    assert sum(ids[cut:].count(document) for document in shared) < 0.02 * len(ids)
    longest = sorted(range(40), key=lambda i: -len(parts[i]))
    assert {document in ids[cut:] for document in longest[:10]} == {True, False}


def test_every_document_gives_the_same_share(sparse_report):
    parts = [list(range(1000)), list(range(100)), [7]]
    assert [len(part) for part in sparse_report.shortened(parts, 110)] == [100, 10, 1]
    assert sparse_report.shortened(parts, 10_000) == parts


def test_a_report_says_what_the_file_and_the_run_hold(sparse_report, tiny_checkpoint, tmp_path, capsys):
    rng = np.random.default_rng(3)
    ids = rng.integers(3, 90, 4000)
    ids[::250] = 2  # ends a text, in the tiny checkpoints
    np.save(tmp_path / "text.npy", ids.astype(np.uint16))
    source = tiny_checkpoint("opt")[0]
    command = ["--tokens", str(tmp_path / "text.npy"), "--model", str(source), "--cache", str(tmp_path / "cache")]
    command += ["--rank", "8", "--share", "0.95", "--measure", "256", "--json", str(tmp_path / "report.json")]
    code = sparse_report.main(command)
    found = json.loads((tmp_path / "report.json").read_text())
    assert code == (found["loss"] > 0.01 or found["held_share"] > 0.95)
    (file,) = tmp_path.glob("cache/*/calibrated.flash")
    with flashfmt.open(file) as model:
        held = found["held_bytes"]
        assert found["file_bytes"] == model.nbytes == file.stat().st_size
        stride = model.layers[0].geometry.stride
        assert 0 <= held["slots"] - stride * sum(found["slots"]) < 4096 * len(found["slots"])
        needed = [info for name, info in model.tensors.items() if "statistics" not in name]
        stored = sum(info.extent.nbytes for info in needed)
        assert 0 <= held["total"] - held["slots"] - stored <= 8192 * len(needed)
    assert found["held_share"] == pytest.approx(held["total"] / found["file_bytes"])
    assert found["n_tokens"] >= 250
    assert 0 < found["window_hit_rate"] < 1
    assert found["loss"] == pytest.approx(found["perplexity_sparse"] / found["perplexity_float16_exact"] - 1)
    assert "as a share of the file" in capsys.readouterr().out
    before = file.stat().st_mtime_ns
    sparse_report.main(command)
    assert file.stat().st_mtime_ns == before
