"""Hub ids: what counts as one, and what each failure says. Nothing is downloaded."""

import sys

import pytest

from flashfmt.convert import open_checkpoint
from flashfmt.convert.hub import download, is_hub_id
from flashfmt.errors import CheckpointError, MissingExtraError


@pytest.mark.parametrize(
    ("source", "is_id"),
    [
        ("org/name", True),
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("name", False),
        ("./org/name", False),
        ("org/name/more", False),
        ("/tmp/x", False),
        ("../x", False),
    ],
)
def test_ids(source, is_id):
    assert is_hub_id(source) == is_id


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'flashfmt\[hub\]'"):
        open_checkpoint("org/name")


@pytest.fixture
def answers(monkeypatch):
    """Make `snapshot_download` raise an error or return a value."""
    hub = pytest.importorskip("huggingface_hub")

    def answer(result):
        def snapshot_download(repository, allow_patterns):
            assert "*.safetensors" in allow_patterns
            assert not any(pattern.endswith((".bin", ".py")) for pattern in allow_patterns)
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)

    return answer


def test_failures_say_what_to_do(answers):
    errors = pytest.importorskip("huggingface_hub.errors")

    def http(kind):
        return kind.__new__(kind)

    for error, reason in [
        (http(errors.GatedRepoError), "accept its licence"),
        (http(errors.RepositoryNotFoundError), "neither a local path nor a visible hub repository"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be fetched from the hub: offline"),
        (errors.OfflineModeIsEnabled("offline mode"), "cannot be fetched"),
        (ConnectionError("no route"), "no route"),
    ]:
        answers(error)
        with pytest.raises(CheckpointError, match=reason):
            download("org/name")


def test_the_id_is_the_source(answers, tiny_checkpoint):
    answers(str(tiny_checkpoint("llama")[0]))
    checkpoint = open_checkpoint("org/tiny-llama")
    assert checkpoint.source == "org/tiny-llama"
    checkpoint.close()
