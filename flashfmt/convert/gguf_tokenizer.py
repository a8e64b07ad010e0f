"""tokenizer.json, tokenizer_config.json and the chat template recreated from GGUF metadata.

Knows: the `tokenizer.*` keys of GGUF. Does not know: how a tokenizer is built (`flashfmt.convert.bpe` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from flashfmt.convert.bpe import byte_level_bpe, json_bytes, prepend_token, sentencepiece_bpe, tokenizer_json
from flashfmt.convert.checkpoint import SourceFile
from flashfmt.errors import CheckpointError

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_NORMAL = 1
_SPACE_MARK = "▁"


def tokenizer_files(metadata: Mapping[str, Any], path: Path) -> dict[str, SourceFile]:
    """The tokenizer's files by role: tokenizer, tokenizer_config and, where the file has one, chat_template.

    Raises
    ------
    CheckpointError
        If the vocabulary is missing, inconsistent, or of an unknown kind or pre-tokenizer.
    """
    vocabulary = _Vocabulary(metadata, path)
    tokenizer = vocabulary.build()
    bos = vocabulary.special("bos")
    if vocabulary.add_bos and bos is not None:
        prepend_token(tokenizer, bos)
    named = {f"{role}_token": vocabulary.special(role) for role in ("bos", "eos", "unknown", "padding")}
    options: dict[str, Any] = {
        "add_bos_token": vocabulary.add_bos,
        "bos_token": named["bos_token"],
        "eos_token": named["eos_token"],
        "unk_token": named["unknown_token"],
        "pad_token": named["padding_token"],
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {"tokenizer": SourceFile("tokenizer.json", tokenizer_json(tokenizer))}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        options["chat_template"] = template
        files["chat_template"] = SourceFile("chat_template.jinja", template.encode())
    files["tokenizer_config"] = SourceFile("tokenizer_config.json", json_bytes(options))
    return files


class _Vocabulary:
    """The vocabulary of a GGUF file, checked."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self.metadata = metadata
        self.path = path
        self.kind = metadata.get("tokenizer.ggml.model")
        if self.kind not in ("gpt2", "llama"):
            raise CheckpointError(
                "unsupported tokenizer",
                path=path,
                where="tokenizer.ggml.model",
                expected="gpt2 or llama",
                actual=self.kind,
            )
        self.tokens: list[str] = self._array("tokens", str, None)
        self.types: list[int] = self._array("token_type", int, len(self.tokens), [_NORMAL] * len(self.tokens))
        self.add_bos = metadata.get("tokenizer.ggml.add_bos_token", self.kind == "llama") is True
        if metadata.get("tokenizer.ggml.add_eos_token"):
            raise CheckpointError(
                "ends every text itself", path=path, where="tokenizer.ggml.add_eos_token", actual=True
            )

    def special(self, role: str) -> str | None:
        """Text of the token with a role (bos, eos, unknown, padding)."""
        token = self.metadata.get(f"tokenizer.ggml.{role}_token_id")
        return self.tokens[token] if isinstance(token, int) and 0 <= token < len(self.tokens) else None

    def build(self) -> Tokenizer:
        added = [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED) and token
        ]
        if self.kind == "llama":
            scores = self._array("scores", float, len(self.tokens))
            rigid = (_UNKNOWN, _CONTROL, _BYTE)
            return sentencepiece_bpe(
                self.tokens,
                scores,
                added,
                unknown=self.special("unknown"),
                add_space_prefix=self.metadata.get("tokenizer.ggml.add_space_prefix", True) is True,
                unmergeable=frozenset(t for t, kind in zip(self.tokens, self.types, strict=True) if kind in rigid),
            )
        merges = [tuple(merge.split(" ")) for merge in self._array("merges", str, None)]
        known = set(self.tokens)
        for pair in merges:
            if len(pair) != 2 or not {*pair, "".join(pair)} <= known:
                raise CheckpointError(
                    "a merge is not of two known tokens into a third",
                    path=self.path,
                    where="tokenizer.ggml.merges",
                    expected="two tokens",
                    actual=" ".join(pair),
                )
        pre = self.metadata.get("tokenizer.ggml.pre", "gpt-2")
        try:
            return byte_level_bpe(self.tokens, [(left, right) for left, right in merges], added, pre)
        except CheckpointError as error:
            raise CheckpointError(
                error.message, path=self.path, where="tokenizer.ggml.pre", expected=error.expected, actual=error.actual
            ) from None

    def _array(self, key: str, kind: type, length: int | None, default: list[Any] | None = None) -> list[Any]:
        values = self.metadata.get(f"tokenizer.ggml.{key}", default)
        where = f"tokenizer.ggml.{key}"
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise CheckpointError(f"missing, or not a list of {kind.__name__}", path=self.path, where=where)
        if length is not None and len(values) != length:
            raise CheckpointError("wrong length", path=self.path, where=where, expected=length, actual=len(values))
        return values
