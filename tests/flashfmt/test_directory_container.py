"""The directory form: each rule broken once, and files that change under the reader."""

import os

import pytest

import flashfmt
from flashfmt import directory_container
from flashfmt.container import read_bytes
from flashfmt.directory_container import DirectoryContainer

SOME = "final_norm/weight/c/0"


def link_file(path):
    (path / SOME).rename(path.parent / "elsewhere")
    (path / SOME).symlink_to(path.parent / "elsewhere")


def link_directory(path):
    (path / "layers").rename(path.parent / "elsewhere")
    (path / "layers").symlink_to(path.parent / "elsewhere")


def root_as_directory(path):
    (path / "zarr.json").unlink()
    (path / "zarr.json").mkdir()
    (path / "zarr.json" / "x").write_bytes(b"")


BREAKS = [
    ("FF-DIR-1", lambda path: (path / "zarr.json").unlink()),
    ("FF-DIR-1", root_as_directory),
    ("FF-DIR-2", link_file),
    ("FF-DIR-2", link_directory),
    ("FF-DIR-2", lambda path: os.mkfifo(path / "pipe")),
    ("FF-DIR-3", lambda path: (path / "empty").mkdir()),
    ("FF-DIR-3", lambda path: (path / ".DS_Store").write_bytes(b"x")),
    ("FF-DIR-3", lambda path: (path / "README.md").write_bytes(b"x")),
    ("FF-DIR-3", lambda path: (path / "a b").write_bytes(b"x")),
    ("FF-DIR-3", lambda path: (path / "new\nline").write_bytes(b"x")),
    ("FF-DIR-3", lambda path: open(os.fsencode(path) + b"/\xff", "wb").close()),
    ("FF-ARR-11", lambda path: (path / "readme").write_bytes(b"x")),
    ("FF-ARR-12", lambda path: (path / SOME).unlink() or (path / "final_norm/weight/c").rmdir()),
    ("FF-SUM-1", lambda path: (path / "layers/0/zarr.json").unlink()),
    ("FF-TEN-2", lambda path: os.truncate(path / SOME, 100)),
]


@pytest.mark.parametrize(("rule", "change"), BREAKS, ids=[f"{i}-{rule}" for i, (rule, _) in enumerate(BREAKS)])
def test_a_broken_rule_is_named(model, tmp_path, rule, change):
    path = model.write_directory(tmp_path / "tiny")
    change(path)
    with pytest.raises(flashfmt.FlashFormatError) as caught:
        flashfmt.open(path)
    assert caught.value.rule == rule, str(caught.value)
    str(caught.value).encode()  # can be printed whatever the names are


def test_files_and_directories_are_counted(model, tmp_path, monkeypatch):
    path = model.write_directory(tmp_path / "tiny")
    monkeypatch.setattr(directory_container, "MAX_ENTRIES", len(list(path.rglob("*"))))
    DirectoryContainer(path).close()
    monkeypatch.setattr(directory_container, "MAX_ENTRIES", len(list(path.rglob("*"))) - 1)
    with pytest.raises(flashfmt.FlashFormatError) as caught:
        DirectoryContainer(path)
    assert caught.value.rule == "FF-LIM-1"


def test_documents_come_first(model, tmp_path):
    path = model.write_directory(tmp_path / "tiny")
    container = DirectoryContainer(path)
    assert next(iter(container.extents)) == "zarr.json"
    assert container.nbytes == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    for key, extent in container.extents.items():
        assert extent.path == path / key
        assert read_bytes(container, key) == container.view(key).tobytes() == (path / key).read_bytes()


def test_views_outlive_the_container(model, tmp_path):
    container = DirectoryContainer(model.write_directory(tmp_path / "tiny"))
    view = container.view(SOME)
    container.close()
    assert view.tobytes() == model.arrays["final_norm/weight"].payload
    with pytest.raises(flashfmt.FlashError, match="closed"):
        read_bytes(container, SOME)


@pytest.mark.parametrize("nbytes", [0, 100, 300])
def test_a_file_that_changes_size_is_a_read_error(model, tmp_path, nbytes):
    path = model.write_directory(tmp_path / "tiny")
    container = DirectoryContainer(path)
    os.truncate(path / SOME, nbytes)
    with pytest.raises(flashfmt.FlashReadError, match="changed"):
        read_bytes(container, SOME)
    with pytest.raises(flashfmt.FlashReadError, match="changed"):
        container.view(SOME)


def test_a_file_replaced_by_a_link_is_a_read_error(model, tmp_path):
    path = model.write_directory(tmp_path / "tiny")
    container = DirectoryContainer(path)
    link_file(path)
    with pytest.raises(flashfmt.FlashReadError, match="cannot open"):
        read_bytes(container, SOME)


def test_a_link_to_a_model_may_be_opened(model, tmp_path):
    path = model.write_directory(tmp_path / "tiny")
    (tmp_path / "link").symlink_to(path)
    with flashfmt.open(tmp_path / "link") as opened:
        opened.verify()
