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
    entries = tokenizer.get("added_tokens")
    if not isinstance(entries, list):
        return {}
    return {
        entry["content"]: entry["id"]
        for entry in entries
        if isinstance(entry, dict) and {"content", "id"} <= set(entry)
    }


def _named(token: Any, added: Mapping[str, int]) -> list[int]:
    text = token.get("content") if isinstance(token, dict) else token
    return _ids(added.get(text)) if isinstance(text, str) else []


def _adds_bos(options: Mapping[str, Any], tokenizer: Mapping[str, Any], bos: int | None) -> bool:
    """Whether texts start with the start token: as tokenizer_config says, else as the post-processor does."""
    if bos is None:
        return False
    if isinstance(options.get("add_bos_token"), bool):
        return bool(options["add_bos_token"])
    processor = tokenizer.get("post_processor") or {}
    steps = processor.get("processors") or [processor]
    return any(_template_starts_with(step, bos) for step in steps if isinstance(step, dict))


def _template_starts_with(step: Mapping[str, Any], bos: int) -> bool:
    if step.get("type") != "TemplateProcessing" or not step.get("single"):
        return False
    first = (step["single"][0].get("SpecialToken") or {}).get("id")
    known = (step.get("special_tokens") or {}).get(first) or {}
    return bos in (known.get("ids") or [])
