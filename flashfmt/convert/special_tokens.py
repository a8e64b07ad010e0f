"""Ids of the special tokens, from generation_config, config, tokenizer_config and tokenizer.json.

Knows: where Hugging Face files name special tokens. Does not know: weights, GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashfmt.convert.checkpoint import Checkpoint, parse_json_object
from flashfmt.manifest import SpecialTokens

_MAX_EOS = 64


def special_tokens(checkpoint: Checkpoint, vocab_size: int) -> SpecialTokens:
    """Start and end tokens of a checkpoint.

    The ids of generation_config.json go before those of config.json, as in transformers' `generate`; the tokenizer's
    own end token is added. Ids outside the vocabulary can never occur and are left out.
    """
    documents = {
        role: parse_json_object(checkpoint.files[role].content, checkpoint.path / checkpoint.files[role].filename)
        for role in ("generation_config", "tokenizer_config", "tokenizer")
        if role in checkpoint.files
    }
    generation, options = documents.get("generation_config", {}), documents.get("tokenizer_config", {})
    added = _added_tokens(documents.get("tokenizer", {}))
    bos_ids = [
        *_ids(generation.get("bos_token_id")),
        *_ids(checkpoint.config.get("bos_token_id")),
        *_named(options.get("bos_token"), added),
    ]
    eos_ids = _ids(generation.get("eos_token_id")) or _ids(checkpoint.config.get("eos_token_id"))
    eos_ids = [*eos_ids, *_named(options.get("eos_token"), added)]
    bos = next((token for token in bos_ids if token < vocab_size), None)
    eos = tuple(dict.fromkeys(token for token in eos_ids if token < vocab_size))[:_MAX_EOS]
    return SpecialTokens(bos=bos, eos=eos, add_bos=_adds_bos(options, documents.get("tokenizer", {}), bos))


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int) and not isinstance(token, bool) and token >= 0]


def _added_tokens(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    entries = [_object(entry) for entry in _list(tokenizer.get("added_tokens"))]
    return {entry["content"]: entry.get("id", -1) for entry in entries if isinstance(entry.get("content"), str)}


def _named(token: Any, added: Mapping[str, int]) -> list[int]:
    text = token.get("content") if isinstance(token, dict) else token
    return _ids(added.get(text)) if isinstance(text, str) else []


def _adds_bos(options: Mapping[str, Any], tokenizer: Mapping[str, Any], bos: int | None) -> bool:
    """Whether texts start with the start token: as tokenizer_config says, else as the post-processor does."""
    if bos is None:
        return False
    if isinstance(options.get("add_bos_token"), bool):
        return bool(options["add_bos_token"])
    processor = _object(tokenizer.get("post_processor"))
    steps = _list(processor.get("processors")) or [processor]
    return any(_template_starts_with(_object(step), bos) for step in steps)


def _template_starts_with(step: Mapping[str, Any], bos: int) -> bool:
    single = _list(step.get("single"))
    if step.get("type") != "TemplateProcessing" or not single:
        return False
    first = _object(_object(single[0]).get("SpecialToken")).get("id")
    known = _object(_object(step.get("special_tokens")).get(first)) if isinstance(first, str) else {}
    return bos in _list(known.get("ids"))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
