"""pack and unpack: the same model in the other container, byte for byte where the order is the canonical one."""

import pytest

import flashfmt
import flashfmt.output
import flashfmt.staging
from flashfmt.diff import differences
from flashfmt.errors import ChecksumError, FlashError, FlashWriteError
from flashfmt.pack import pack, unpack


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    """Don't wait for the disk: what syncs must be there is test_write_faults' matter."""
    monkeypatch.setattr(flashfmt.output, "fsync", lambda _: None)


@pytest.fixture
def canonical(source, tmp_path):
    """A file in canonical order."""
    pack(source.path, tmp_path / "canonical.flash")
    return tmp_path / "canonical.flash"


def test_packing_what_was_unpacked_gives_the_same_bytes(canonical, tmp_path, content):
    unpack(canonical, tmp_path / "d")
    pack(tmp_path / "d", tmp_path / "m.flash")
    assert content(tmp_path / "m.flash") == content(canonical)


@pytest.mark.parametrize("codec", ["raw", "zstd", "blosc"])
@pytest.mark.parametrize("encoding", ["f16", "q4"])
def test_the_copy_is_the_same_model(tiny, tmp_path, writing, codec, encoding):
    path = tiny(encoding, residents=encoding).write_file(tmp_path / "source.flash")
    with flashfmt.open(path) as model:
        writing.copy(model, tmp_path / "m.flash", codec=codec)
    unpack(tmp_path / "m.flash", tmp_path / "d")
    pack(tmp_path / "d", tmp_path / "p.flash")
    with flashfmt.open(tmp_path / "m.flash") as a, flashfmt.open(tmp_path / "p.flash") as b:
        b.verify()
        assert list(differences(a, b)) == []
        assert {n: t.codec for n, t in a.tensors.items()} == {n: t.codec for n, t in b.tensors.items()}


def test_documents_of_another_writer_are_kept(model, tmp_path, content):
    model.root_attributes["somebody_else"] = {"note": "kept"}
    model.write_directory(tmp_path / "d")
    pack(tmp_path / "d", tmp_path / "m.flash")
    unpack(tmp_path / "m.flash", tmp_path / "e")
    assert content(tmp_path / "e") == content(tmp_path / "d")


def test_the_canonical_order_is_that_of_a_forward_pass(canonical):
    with flashfmt.open(canonical) as model:
        offsets = {name: info.extent.offset for name, info in model.tensors.items()}
        offsets |= {info.name: info.extent.offset for info in model.layers}
        offsets |= {f"files/{role}": info.extent.offset for role, info in model.files.items()}
    order = sorted(offsets, key=offsets.__getitem__)
    assert order[:3] == ["files/chat_template", "files/tokenizer", "embedding/tokens"]
    assert order[-4:] == [f"layers/{i}/ffn/{name}" for i in (0, 1) for name in ("bundles", "bundle_crc32c")]
    assert order.index("layers/0/attention/q/weight") < order.index("layers/1/attention/q/weight")


def test_progress_reports_every_byte(canonical, tmp_path):
    seen = []
    unpack(canonical, tmp_path / "d", progress=seen.append)
    with flashfmt.open(canonical) as model:
        arrays = [*model.tensors.values(), *model.layers, *model.files.values()]
        assert sum(seen) == sum(info.extent.nbytes for info in arrays)


def test_a_damaged_source_is_refused(canonical, tmp_path):
    with flashfmt.open(canonical) as model:
        at = model.layers[1].extent.offset + 5
    raw = bytearray(canonical.read_bytes())
    raw[at] ^= 1
    canonical.write_bytes(raw)
    with pytest.raises(ChecksumError) as error:
        unpack(canonical, tmp_path / "d")
    assert (error.value.rule, error.value.where) == ("FF-SUM-4", "layers/1/ffn/bundles")
    assert not (tmp_path / "d").exists()


def test_an_interrupted_copy_is_continued(canonical, tmp_path, content, monkeypatch):
    monkeypatch.setattr(flashfmt.staging, "SYNC_NBYTES", 1)
    with flashfmt.open(canonical) as model:
        half = model.verify_nbytes // 2
    done = 0

    def interrupt(nbytes):
        nonlocal done
        done += nbytes
        if done > half:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(canonical, tmp_path / "m.flash", progress=interrupt)
    assert (tmp_path / "m.flash.partial").exists()
    pack(canonical, tmp_path / "m.flash")
    assert content(tmp_path / "m.flash") == content(canonical)
    assert not list(tmp_path.glob("*.partial*"))


def test_an_existing_target_is_replaced_only_when_asked(canonical, tmp_path, content):
    unpack(canonical, tmp_path / "d")
    with pytest.raises(FlashWriteError, match="exists already"):
        unpack(canonical, tmp_path / "d")
    unpack(canonical, tmp_path / "d", overwrite=True)
    expected = content(canonical)
    pack(canonical, canonical, overwrite=True)
    assert content(canonical) == expected


def test_a_missing_source(tmp_path):
    with pytest.raises(FlashError, match="no such file"):
        pack(tmp_path / "nothing", tmp_path / "m.flash")
