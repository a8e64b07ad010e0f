"""The journal: what it says survives, what is damaged ends it, and one writer at a time holds it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashfmt
import flashfmt.staging
from flashfmt import FlashWriteError, FlashWriter
from flashfmt.errors import FlashError
from flashfmt.journal import Journal, JournalHeader, StoredPayload

HEADER = JournalHeader("source", "declaration", "file")
UNITS = [
    (StoredPayload("a/c/0", 64, 10, 1, 2),),
    (StoredPayload("b/c/0", 128, 2**40, 2**32 - 1, 0), StoredPayload("c/c/0", 2**41, 7, 5, 6)),
]


@pytest.fixture
def written(tmp_path):
    """Path of a journal of a header and two units."""
    journal = Journal(tmp_path / "m.partial.journal")
    journal.begin(HEADER)
    for unit in UNITS:
        journal.add([unit])
    journal.close()
    return journal.path


def read(path):
    journal = Journal(path)
    journal.close()
    return journal.header, journal.units


def test_what_was_added_is_read_again(written):
    assert read(written) == (HEADER, UNITS)


def test_a_new_journal_is_empty(tmp_path):
    assert read(tmp_path / "new") == (None, [])


@given(data=st.data())
@settings(max_examples=60)
def test_a_cut_keeps_the_whole_lines_before_it(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = Journal(path)
    journal.begin(HEADER)
    journal.add(UNITS)
    journal.close()
    raw = path.read_bytes()
    cut = data.draw(st.integers(0, len(raw)))
    flip = data.draw(st.booleans()) and cut < len(raw)
    damaged = raw[:cut] + (bytes([raw[cut] ^ 1]) + raw[cut + 1 :] if flip else b"")
    path.write_bytes(damaged)
    n_lines = raw[:cut].count(b"\n")
    assert read(path) == (HEADER if n_lines else None, UNITS[: max(0, n_lines - 1)])
    journal = Journal(path)
    if journal.header is not None:
        journal.add(UNITS[n_lines - 1 :])
        journal.close()
        assert read(path) == (HEADER, UNITS)
    journal.close()


def test_another_version_is_no_journal_of_ours(written):
    journal = Journal(written)
    journal.begin(JournalHeader("source", "declaration", "file", version=2))
    journal.close()
    assert read(written)[0] == JournalHeader("source", "declaration", "file", version=2)


def test_a_second_holder_is_refused(written):
    journal = Journal(written)
    with pytest.raises(FlashWriteError, match="another process is writing"):
        Journal(written)
    journal.remove()
    Journal(written).remove()
    assert not written.exists()


class TestResume:
    """What an interrupted writer leaves, and what the next one makes of it."""

    @pytest.fixture(autouse=True)
    def _sync_often(self, monkeypatch):
        monkeypatch.setattr(flashfmt.staging, "SYNC_NBYTES", 1)

    def interrupt(self, path, source, writing, n_arrays, **options):
        """Write the first tensors, then fail."""

        def fill(writer):
            for name in list(source.tensors)[:n_arrays]:
                if not name.endswith("bundle_crc32c"):
                    writer.write_tensor(name, source.tensor(name).data)
            raise KeyboardInterrupt

        declared = writing.declaration(source)
        with (
            pytest.raises(KeyboardInterrupt),
            FlashWriter(path, **declared, **{"fingerprint": "x"} | options) as writer,
        ):
            fill(writer)
        assert not path.exists()

    def partials(self, path):
        return sorted(p.name for p in path.parent.glob(path.name + ".*"))

    def fill_tensors_first(self, writer, source, writing):
        for name in source.tensors:
            if not name.endswith("bundle_crc32c"):
                writer.write_tensor(name, source.tensor(name).data)
        for role in source.files:
            writer.write_file(role, source.file(role))
        for layer in range(len(source.layers)):
            writing.fill_bundles(writer, source, layer)

    def test_the_next_run_continues(self, source, tmp_path, writing, container, content):
        declaration = writing.declaration(source)
        reference, path = tmp_path / "reference", tmp_path / "m"
        with FlashWriter(reference, **declaration, container=container, fingerprint="") as writer:
            self.fill_tensors_first(writer, source, writing)
        self.interrupt(path, source, writing, 5, container=container)
        with FlashWriter(path, **declaration, container=container, fingerprint="x") as writer:
            done = [name for name in source.tensors if writer.is_done(name)]
            self.fill_tensors_first(writer, source, writing)
        assert done == [name for name in source.tensors if not name.endswith("bundle_crc32c")][: len(done)]
        assert len(done) >= 4
        assert content(path) == content(reference)
        assert self.partials(path) == []

    @pytest.mark.parametrize("what", ["fingerprint", "codec", "container"])
    def test_another_declaration_starts_afresh(self, source, tmp_path, writing, what):
        path = tmp_path / "m"
        self.interrupt(path, source, writing, 5, container="file")
        options = {"fingerprint": "x", "container": "file"}
        options |= {"fingerprint": {"fingerprint": "y"}, "container": {"container": "directory"}}.get(what, {})
        declaration = writing.declaration(source, "zstd" if what == "codec" else "raw")
        with FlashWriter(path, **declaration, **options) as writer:
            assert not any(writer.is_done(name) for name in source.tensors)
            writing.fill(writer, source)
        with flashfmt.open(path) as written:
            written.verify()
        assert self.partials(path) == []

    def test_a_partial_that_is_too_short_starts_afresh(self, source, tmp_path, writing):
        path = tmp_path / "m.flash"
        self.interrupt(path, source, writing, 5)
        (tmp_path / "m.flash.partial").write_bytes(b"")
        with FlashWriter(path, **writing.declaration(source), fingerprint="x") as writer:
            assert not any(writer.is_done(name) for name in source.tensors)
            writing.fill(writer, source)

    @pytest.mark.parametrize("kind", ["file", "directory"])
    def test_a_partial_of_somebody_else_is_not_touched(self, source, tmp_path, writing, kind):
        precious = tmp_path / "m.flash.partial"
        if kind == "directory":
            precious.mkdir()
            precious /= "x"
        precious.write_text("precious")
        with pytest.raises(FlashWriteError, match="in the way"):
            writing.copy(source, tmp_path / "m.flash")
        assert precious.read_text() == "precious"

    def test_discard_removes_what_is_left(self, source, tmp_path, writing, container):
        path = tmp_path / "m"
        self.interrupt(path, source, writing, 5, container=container)
        assert self.partials(path) == ["m.partial", "m.partial.journal"]
        writer = FlashWriter(path, **writing.declaration(source), container=container, fingerprint="x")
        writer.discard()
        assert self.partials(path) == []
        writer.discard()

    def test_discard_while_writing_is_refused(self, source, tmp_path, writing):
        with FlashWriter(tmp_path / "m", **writing.declaration(source), fingerprint="") as writer:
            with pytest.raises(FlashError, match="in use"):
                writer.discard()
            writing.fill(writer, source)

    def test_two_writers_of_one_target(self, source, tmp_path, writing):
        path = tmp_path / "m.flash"
        with FlashWriter(path, **writing.declaration(source), fingerprint="") as writer:
            with pytest.raises(FlashWriteError, match="another process is writing"):
                writing.copy(source, path)
            writing.fill(writer, source)
        with flashfmt.open(path) as written:
            written.verify()
