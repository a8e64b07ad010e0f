"""FlashWriter: what it writes reads back, is reproducible, and wrong use is refused before or while it happens."""

import errno
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

import flashfmt
import flashfmt.output
from flashfmt import BundlesSpec, Encoding, FileSpec, FlashError, FlashWriteError, FlashWriter, TensorSpec


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    """Don't wait for the disk: what syncs must be there is test_write_faults' matter."""
    monkeypatch.setattr(flashfmt.output, "fsync", lambda _: None)


@pytest.mark.parametrize("encoding", ["f32", "f16", "bf16", "q8", "q4"])
@pytest.mark.parametrize("codec", ["raw", "zstd", "blosc"])
def test_what_is_written_reads_back(tiny, tmp_path, writing, container, encoding, codec):
    path = tiny(encoding, residents=encoding).write_file(tmp_path / "source.flash")
    with flashfmt.open(path) as source:
        writing.copy(source, tmp_path / "m", container=container, codec=codec)
        with flashfmt.open(tmp_path / "m") as written:
            written.verify()
            assert written.container == container
            assert written.tensors.keys() == source.tensors.keys()
            for name in source.tensors:
                np.testing.assert_array_equal(written.tensor(name).data, source.tensor(name).data)
            for layer in range(len(source.layers)):
                np.testing.assert_array_equal(written.bundles(layer).rows, source.bundles(layer).rows)
            assert {role: written.file(role) for role in written.files} == {r: source.file(r) for r in source.files}
            assert {t.codec for n, t in written.tensors.items() if not n.endswith("bundle_crc32c")} == {codec}


@pytest.mark.parametrize("codec", ["raw", "zstd", "blosc"])
def test_equal_input_gives_equal_bytes(source, tmp_path, writing, container, content, codec):
    first, second = (
        writing.copy(source, tmp_path / n, container=container, codec=codec, fingerprint=n) for n in ("a", "b")
    )
    assert content(first) == content(second)


def test_the_suffix_decides_the_container(source, tmp_path, writing):
    assert writing.copy(source, tmp_path / "m.flash").is_file()
    assert writing.copy(source, tmp_path / "m").is_dir()


def test_any_zip_tool_reads_the_file(source, tmp_path, writing):
    with zipfile.ZipFile(writing.copy(source, tmp_path / "m.flash")) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_the_rows_of_a_block_that_is_not_contiguous_are_written(source, tmp_path, writing):
    info = source.layers[0]
    rows = np.stack([source.bundles(0).bundle(i) for i in range(info.geometry.n_neurons)])
    with FlashWriter(tmp_path / "m", **writing.declaration(source), fingerprint="") as writer:
        with writer.bundles(0) as sink:
            sink.append(np.asfortranarray(rows))
        writer.write_tensor("embedding/tokens", np.asfortranarray(source.tensor("embedding/tokens").data))
        declared = {name: source.tensor(name).data for name in source.tensors}
        for name in declared.keys() - {"embedding/tokens"}:
            if not name.endswith("bundle_crc32c"):
                writer.write_tensor(name, declared[name])
        for role in source.files:
            writer.write_file(role, source.file(role))
        with writer.bundles(1) as sink:
            sink.append(np.stack([source.bundles(1).bundle(i) for i in range(info.geometry.n_neurons)]))
    with flashfmt.open(tmp_path / "m") as written:
        written.verify()
        np.testing.assert_array_equal(written.bundles(0).rows, source.bundles(0).rows)


class TestDeclaration:
    """What cannot become a valid model is refused before a file exists."""

    def refused(self, tmp_path, declaration, rule=None, match="cannot be written"):
        with pytest.raises(FlashError, match=match) as error:
            FlashWriter(tmp_path / "m.flash", **declaration, fingerprint="")
        assert error.value.rule == rule
        assert error.value.exit_code == 1
        assert not list(tmp_path.glob("m.flash*"))

    def test_a_missing_tensor(self, source, tmp_path, writing):
        declaration = writing.declaration(source)
        del declaration["tensors"][0]
        self.refused(tmp_path, declaration, "FF-MAN-11")

    def test_missing_bundles(self, source, tmp_path, writing):
        declaration = writing.declaration(source)
        del declaration["bundles"][1]
        self.refused(tmp_path, declaration, "FF-MAN-11")

    def test_an_unknown_tensor(self, source, tmp_path, writing):
        declaration = writing.declaration(source)
        declaration["tensors"].append(TensorSpec("surplus", Encoding.F32, (3,)))
        self.refused(tmp_path, declaration, "FF-MAN-10")

    def test_a_wrong_shape(self, source, tmp_path, writing):
        declaration = writing.declaration(source)
        tensors = declaration["tensors"]
        tensors[:] = [TensorSpec(t.name, t.encoding, (*t.shape[:-1], t.shape[-1] + 64)) for t in tensors]
        self.refused(tmp_path, declaration, "FF-MAN-12")

    def test_rows_that_do_not_fit_the_encoding(self, source, tmp_path, writing):
        declaration = writing.declaration(source)
        declaration["tensors"].append(TensorSpec("extensions/x", Encoding.Q4, (2, 65)))
        self.refused(tmp_path, declaration, "FF-TEN-1", "multiple of 64")

    def test_a_bad_alignment(self, source, tmp_path, writing):
        declaration = writing.declaration(source)
        b = declaration["bundles"][0]
        declaration["bundles"][0] = BundlesSpec(b.layer, b.encoding, b.parts, b.n_neurons, b.d_model, alignment=96)
        self.refused(tmp_path, declaration, "FF-ALIGN-4")

    def test_an_empty_file(self, source, tmp_path, writing):
        declaration = writing.declaration(source)
        declaration["files"].append(FileSpec.of("licence", "LICENSE", b""))
        self.refused(tmp_path, declaration, "FF-ARR-4")

    def test_a_name_twice(self, source, tmp_path, writing):
        declaration = writing.declaration(source)
        declaration["tensors"].append(declaration["tensors"][0])
        self.refused(tmp_path, declaration, match="declared twice")


class TestUse:
    """Wrong values are refused; the target then does not appear, and what was right is kept."""

    @pytest.fixture
    def open_writer(self, source, tmp_path, writing):
        def make():
            return FlashWriter(tmp_path / "m.flash", **writing.declaration(source), fingerprint="")

        yield make
        assert not (tmp_path / "m.flash").exists()

    def test_a_missing_array(self, open_writer, source):
        with pytest.raises(FlashError, match="not written") as error, open_writer() as writer:
            writer.write_tensor("embedding/tokens", source.tensor("embedding/tokens").data)
        assert error.value.where == "files/chat_template"

    def test_missing_bundles(self, open_writer, source):
        with (
            pytest.raises(FlashError, match=r"bundles are missing .expected 6, got 1"),
            open_writer() as writer,
            writer.bundles(0) as sink,
        ):
            sink.append(source.bundles(0).bundle(0)[None])

    def test_too_many_bundles(self, open_writer, source):
        with pytest.raises(FlashError, match="more bundles"), open_writer() as writer, writer.bundles(0) as sink:
            sink.append(np.stack([source.bundles(0).bundle(0)] * 7))

    @pytest.mark.parametrize(
        "block", [np.zeros((1, 3, 63), "<f2"), np.zeros((1, 3, 64), "<f4"), np.zeros((3, 64), "<f2")]
    )
    def test_bundles_of_another_form(self, open_writer, block):
        with pytest.raises(FlashError, match="another form"), open_writer() as writer, writer.bundles(0) as sink:
            sink.append(block)

    @pytest.mark.parametrize("data", [np.zeros((32, 63), "<f2"), np.zeros((32, 64), "<f4"), np.zeros((32, 64), ">f2")])
    def test_values_of_another_form(self, open_writer, data):
        with pytest.raises(FlashError, match="another form"), open_writer() as writer:
            writer.write_tensor("embedding/tokens", data)

    def test_an_array_twice(self, open_writer, source):
        def write_twice(writer):
            writer.write_tensor("embedding/tokens", source.tensor("embedding/tokens").data)
            writer.write_tensor("embedding/tokens", source.tensor("embedding/tokens").data)

        with pytest.raises(FlashError, match="given twice"), open_writer() as writer:
            write_twice(writer)

    def test_another_file(self, open_writer):
        with pytest.raises(FlashError, match="not the content declared"), open_writer() as writer:
            writer.write_file("tokenizer", b"other")

    def test_an_array_before_the_bundles_are_complete(self, open_writer, source):
        def write_between(writer):
            writer.bundles(0)
            writer.write_tensor("embedding/tokens", source.tensor("embedding/tokens").data)

        with pytest.raises(FlashError, match="before layers/0/ffn/bundles is complete"), open_writer() as writer:
            write_between(writer)

    @pytest.mark.parametrize(
        "call",
        [
            lambda w: w.write_tensor("layers/0/ffn/bundles", np.zeros(1)),
            lambda w: w.write_tensor("nothing", np.zeros(1)),
            lambda w: w.write_file("licence", b""),
            lambda w: w.bundles(2),
            lambda w: w.is_done("nothing"),
        ],
    )
    def test_what_is_not_declared(self, open_writer, call):
        with pytest.raises(FlashError, match="declared"), open_writer() as writer:
            call(writer)

    def test_a_writer_that_is_not_open(self, open_writer, source):
        with pytest.raises(FlashError, match="not open"):
            open_writer().write_tensor("embedding/tokens", source.tensor("embedding/tokens").data)


class TestTarget:
    """What stands under the final name, and when."""

    def test_an_existing_target_is_refused_before_any_work(self, source, tmp_path, writing, container):
        target = tmp_path / "m"
        target.write_text("precious")
        with pytest.raises(FlashWriteError, match="exists already"):
            FlashWriter(target, **writing.declaration(source), container=container, fingerprint="")
        assert target.read_text() == "precious"
        assert not list(tmp_path.glob("m.partial*"))

    def test_an_existing_model_is_replaced_when_asked(self, source, tmp_path, writing, container, content):
        target = writing.copy(source, tmp_path / "m", container=container)
        expected = content(target)
        for old in ("file", "directory"):
            writing.copy(source, target, container=old, overwrite=True)
            writing.copy(source, target, container=container, overwrite=True)
            assert content(target) == expected
        assert {p.name for p in tmp_path.iterdir()} == {"m", "source.flash"}

    def test_a_directory_that_is_no_model_is_never_replaced(self, source, tmp_path, writing):
        home = tmp_path / "home"
        home.mkdir()
        (home / "thesis.tex").write_text("precious")
        with pytest.raises(FlashWriteError, match="not a flash model"):
            FlashWriter(home, **writing.declaration(source), overwrite=True, fingerprint="")
        assert (home / "thesis.tex").read_text() == "precious"

    def test_the_old_model_stays_until_the_new_one_is_complete(self, source, tmp_path, writing, content):
        target = writing.copy(source, tmp_path / "m.flash")
        expected = content(target)
        declaration = writing.declaration(source, "zstd")
        with FlashWriter(target, **declaration, overwrite=True, fingerprint="") as writer:
            writing.fill(writer, source)
            assert content(target) == expected
        assert content(target) != expected

    def test_a_target_that_appears_meanwhile_is_kept(self, source, tmp_path, writing):
        target = tmp_path / "m.flash"

        def fill(writer):
            writing.fill(writer, source)
            target.write_text("precious")

        with (
            pytest.raises(FlashWriteError, match="exists already"),
            FlashWriter(target, **writing.declaration(source), fingerprint="") as writer,
        ):
            fill(writer)
        assert target.read_text() == "precious"

    def test_a_missing_parent(self, source, tmp_path, writing):
        with pytest.raises(FlashWriteError, match="no such directory"):
            writing.copy(source, tmp_path / "nowhere" / "m.flash")

    @pytest.mark.parametrize("name", [".", "..", "/", "nul\0", "x" * 300])
    def test_a_name_that_cannot_be(self, source, tmp_path, writing, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FlashWriteError):
            writing.copy(source, Path(name), overwrite=True)

    def test_a_disk_that_is_too_small(self, source, tmp_path, writing, monkeypatch):
        full = os.statvfs_result((4096, 4096, 10, 2, 2, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda _: full)
        with pytest.raises(FlashWriteError, match=r"not enough free space .expected at least .* got 8192"):
            writing.copy(source, tmp_path / "m.flash")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_read_only_directory(self, source, tmp_path, writing):
        (tmp_path / "ro").mkdir(mode=0o500)
        with pytest.raises(FlashWriteError, match=os.strerror(errno.EACCES)):
            writing.copy(source, tmp_path / "ro" / "m.flash")
