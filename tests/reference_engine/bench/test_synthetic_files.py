"""Synthetic models in a cache folder: written once, whole or not at all."""

import dataclasses
import shutil
from collections import namedtuple

import pytest

import flashfmt
from flashfmt.encodings import Encoding
from flashfmt.errors import FlashError, FlashWriteError
from reference_engine.bench.synthetic_files import SyntheticFiles, predictor_ranks
from reference_engine.synthetic import SHAPES, Shape, synthetic_nbytes

TINY = Shape("tiny", 3, 64, 128, 4, 4, 97, plain=True, tied=True, context_tokens=64)


def files(folder, shape=TINY, keep=True, say=print, report=lambda *_: None):
    return SyntheticFiles(shape, folder, residents=Encoding.F16, keep=keep, say=say, report=report)


def test_a_file_is_written_once_and_told(tmp_path):
    said = []
    source = files(tmp_path / "cache", say=said.append)
    path = source.path(Encoding.Q8)
    changed = path.stat().st_mtime_ns
    assert source.path(Encoding.Q8) == path
    assert path.stat().st_mtime_ns == changed
    assert len(said) == 1
    assert "q8 bundles" in said[0]
    with flashfmt.open(path) as model:
        model.verify()
        assert [p.rank for p in model.manifest.predictors] == [64, 64, 64]
        assert model.nbytes == pytest.approx(
            synthetic_nbytes(TINY, encoding=Encoding.Q8, predictor_ranks=(64,) * 3), rel=0.5
        )


def test_only_what_was_written_here_goes(tmp_path):
    kept = files(tmp_path).path(Encoding.F16)
    with files(tmp_path, keep=False) as source:
        assert source.path(Encoding.F16) == kept
        other = source.path(Encoding.Q4)
    assert kept.exists()
    assert not other.exists()


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupt(what, done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files(tmp_path, report=interrupt).path(Encoding.F16)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_with_figures(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(FlashWriteError, match="no room") as caught:
        files(tmp_path).path(Encoding.F16)
    assert caught.value.actual == 1


def test_another_model_of_the_same_name_is_in_the_way(tmp_path):
    files(tmp_path).path(Encoding.F16)
    with pytest.raises(FlashError, match="in the way"):
        files(tmp_path, dataclasses.replace(TINY, n_layers=2)).path(Encoding.F16)


def test_ranks_are_the_paper_s():
    assert predictor_ranks(SHAPES["opt-6.7b"]) == (128,) * 28 + (1024,) * 4
    assert predictor_ranks(SHAPES["falcon-7b"])[-5:] == (256,) + (1152,) * 4
    assert predictor_ranks(SHAPES["llama-2-7b"]) == ()


@pytest.mark.parametrize("name", ["falcon-7b", "relu-llama-2-7b", "opt-13b"])
def test_every_kind_of_shape_runs(name, tmp_path):
    """The kinds of decoder, in small: a token goes through."""
    from reference_engine.engine import Engine, EngineOptions

    small = {"n_layers": 2, "d_model": 128, "d_ff": 256, "n_heads": 4, "vocab_size": 97, "context_tokens": 64}
    n_kv_heads = 1 if name == "falcon-7b" else 4
    shape = dataclasses.replace(SHAPES[name], n_kv_heads=n_kv_heads, **small)
    path = files(tmp_path, shape).path(Encoding.F16)
    with Engine(path, EngineOptions(backend="numpy")) as engine:
        engine.load()
        assert engine.start().feed([1, 2, 3]).shape == (97,)
