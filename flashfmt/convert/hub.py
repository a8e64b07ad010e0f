"""Checkpoints named by a Hugging Face hub id: `org/name` is downloaded to the local hub cache, then read from there.

Knows: `huggingface_hub`, an optional dependency. Does not know: what the files hold.
"""

from __future__ import annotations

import re
from pathlib import Path

from flashfmt.errors import CheckpointError, MissingExtraError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE*",
    "README.md",
)


def is_hub_id(source: str) -> bool:
    """Whether a source that is no existing path can be the id of a hub repository."""
    return _HUB_ID.fullmatch(source) is not None


def download(repository: str) -> Path:
    """Directory of a hub repository's files in the local cache, after downloading what is missing.

    Raises
    ------
    MissingExtraError
        If `huggingface_hub` is not installed.
    CheckpointError
        If the repository does not exist, needs an accepted licence, or cannot be reached.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingExtraError(
            f"{repository} is no local path; to fetch it from the Hugging Face hub: pip install 'flashfmt[hub]'"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(PATTERNS)))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repository} is gated: accept its licence on the hub's page, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{repository} is neither a local path nor a visible hub repository") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{repository} is no local path and cannot be fetched from the hub: {error}") from error
