"""Tokenizers rebuilt as tokenizer.json from their parts: byte-level BPE, and SentencePiece BPE with byte fallback.

Knows: the `tokenizers` library and the pre-tokenizers that model families use. Does not know: GGUF, checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from flashfmt.convert.checkpoint import parse_json_object, read_limited
from flashfmt.errors import CheckpointError

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("gpt-2", "gpt2", "default")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "codeshell")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")

PRE_TOKENIZERS = (*_GPT2, *_SINGLE_DIGITS, *_LLAMA3, *_QWEN2)
"""Names of pre-tokenizers, as GGUF's `tokenizer.ggml.pre` gives them."""


def byte_level_bpe(
    tokens: Sequence[str], merges: Iterable[tuple[str, str]], added: Sequence[AddedToken], pre: str = "gpt-2"
) -> Tokenizer:
    """A byte-level BPE tokenizer.

    Parameters
    ----------
    tokens : the vocabulary in order of id, in GPT-2's byte alphabet; the added tokens included.
    merges : pairs, in order of precedence.
    added : tokens that are matched whole in the text.
    pre : one of `PRE_TOKENIZERS`; anything else raises CheckpointError.
    """
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=pre in _LLAMA3))
    if pre in _GPT2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif pre in _LLAMA3:
        tokenizer.pre_tokenizer = _split(_LLAMA3_SPLIT)
    elif pre in _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = _split(_QWEN2_SPLIT)
    else:
        raise CheckpointError("unknown pre-tokenizer", expected="one of " + ", ".join(PRE_TOKENIZERS), actual=pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added))
    return tokenizer


def sentencepiece_bpe(
    tokens: Sequence[str],
    scores: Sequence[float],
    added: Sequence[AddedToken],
    *,
    unknown: str | None,
    add_space_prefix: bool,
    unmergeable: frozenset[str],
) -> Tokenizer:
    """SentencePiece BPE with byte fallback, its merges recovered from the scores.

    Parameters
    ----------
    scores : per token; the higher, the earlier two pieces merge into it.
    unknown : the token for what neither pieces nor bytes can spell.
    add_space_prefix : whether a text gets a leading space.
    unmergeable : tokens that no merge makes or uses: control and byte tokens.
    """
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = _merges_from_scores(vocabulary, scores, unmergeable)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    scheme = "first" if add_space_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_tokens(list(added))
    return tokenizer


def prepend_token(tokenizer: Tokenizer, token: str) -> None:
    """Make the tokenizer start every text with `token`."""
    token_id = tokenizer.token_to_id(token)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )


def tokenizer_from_bpe_files(path: Path) -> bytes:
    """tokenizer.json for a directory that holds GPT-2's vocab.json and merges.txt instead, as OPT's do.

    Special tokens come from special_tokens_map.json, and the start token from tokenizer_config.json's `add_bos_token`.
    """
    vocabulary = parse_json_object(read_limited(path / "vocab.json"), path / "vocab.json")
    if not all(type(token_id) is int for token_id in vocabulary.values()):
        raise CheckpointError("token ids are not integers", path=path / "vocab.json")
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in tokens] != list(range(len(tokens))):
        raise CheckpointError("token ids are not 0, 1, 2, ...", path=path / "vocab.json")
    lines = read_limited(path / "merges.txt").decode(errors="replace").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if any(len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys() for pair in merges):
        raise CheckpointError("a line is not two known pieces that make a third", path=path / "merges.txt")
    options, special = (
        parse_json_object(read_limited(path / name), path / name) if (path / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    names = {name: _content(special.get(name) or options.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    added = [AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(names.values()) if token]
    tokenizer = byte_level_bpe(tokens, [(left, right) for left, right in merges], added)
    if names["bos_token"] and options.get("add_bos_token"):
        prepend_token(tokenizer, names["bos_token"])
    return tokenizer_json(tokenizer)


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The content of tokenizer.json."""
    text: str = tokenizer.to_str(pretty=False)
    return text.encode()


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """An object as the readable JSON that Hugging Face directories hold."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _content(token: Any) -> str | None:
    """The text of a special token, which is a string or an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _split(pattern: str) -> pre_tokenizers.Sequence:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _merges_from_scores(
    vocabulary: Mapping[str, int], scores: Sequence[float], unmergeable: frozenset[str]
) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first, as transformers' `generate_merges` orders them."""
    pieces = {token: i for token, i in vocabulary.items() if token not in unmergeable}
    ranked = []
    for token, token_id in pieces.items():
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in pieces and right in pieces]
        pairs.sort(key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
        ranked += [(scores[token_id], len(left), len(right), (left, right)) for left, right in pairs]
    ranked.sort(key=lambda entry: entry[:3], reverse=True)
    return [entry[3] for entry in ranked]
