"""Text to token ids and back, by the tokenizer that the file carries.

Encoding is the `tokenizers` library's. Decoding a whole text too; `Detokenizer` gives the same text while it streams:
each token is turned into bytes by itself, and the bytes into characters as soon as these are complete.

Knows: tokenizer.json and the kinds of decoder that language models use. Does not know: the model, chat templates.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import tokenizers

from flashfmt import FlashModel
from flashfmt.errors import PromptError, UnsupportedError
from flashfmt.manifest import SpecialTokens

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTEWISE: Final = frozenset({"ByteLevel", "Fuse"})
_TOKENWISE: Final = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"})


class Tokenizer:
    """A file's tokenizer.

    Parameters
    ----------
    content : of tokenizer.json.
    tokens : the roles of token ids, from the manifest.

    Raises
    ------
    PromptError
        If the content is no tokenizer.
    UnsupportedError
        If its decoder is of a kind that cannot be streamed.
    """

    def __init__(self, content: bytes, tokens: SpecialTokens) -> None:
        try:
            self._library = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise PromptError(f"the file's tokenizer cannot be used: {error}", where="files/tokenizer") from error
        self._library.no_truncation()
        self._library.no_padding()
        self.tokens = tokens
        self.special_ids = frozenset(
            token_id for token_id, token in self._library.get_added_tokens_decoder().items() if token.special
        )
        kinds = {decoder["type"] for decoder in _decoders(self._library)}
        self._is_bytewise = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        unknown = kinds - (_BYTEWISE if self._is_bytewise else _TOKENWISE)
        if unknown:
            raise UnsupportedError(
                "the tokenizer's decoder is of a kind that cannot be streamed",
                where="files/tokenizer",
                expected=f"ByteLevel, or some of {', '.join(sorted(_TOKENWISE))}",
                actual=", ".join(sorted(kinds)),
            )
        self._anchor = self._plain_token()
        self._anchor_text = self.decode(self._anchor)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model may have more rows than that."""
        return int(self._library.get_vocab_size(with_added_tokens=True))

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None for an id without one."""
        text: str | None = self._library.id_to_token(token_id)
        return text

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text.

        Special tokens that the text spells out become those tokens. `add_special_tokens` puts the manifest's bos in
        front where it says `add_bos` and the text does not begin with it: for a plain prompt, not for the result of a
        chat template.

        Raises
        ------
        PromptError
            If the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                "the prompt is not valid Unicode", where=f"character {error.start}", actual=repr(text[error.start])
            ) from None
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        bos = self.tokens.bos
        if add_special_tokens and self.tokens.add_bos and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids. Ids without a token give nothing."""
        text: str = self._library.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, *, skip_special_tokens: bool = False) -> Detokenizer:
        """A `Detokenizer` for a new text."""
        return Detokenizer(self, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the UTF-8 bytes of a text, anywhere but at its beginning; incomplete characters too."""
        token = self.token(token_id)
        if token is None:
            return b""
        if self._is_bytewise:
            return _unspell(token)
        raw = self._raw_byte(token)
        if raw is not None:
            return raw
        return self.decode([*self._anchor, token_id]).removeprefix(self._anchor_text).encode()

    def _raw_byte(self, token: str) -> bytes | None:
        """The byte of a byte-fallback token that is only part of a character, or None."""
        match = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        return bytes([int(match[1], 16)]) if match is not None and match[1] >= "80" else None

    def first_bytes(self, token_id: int) -> bytes:
        """What a token gives at the beginning of a text, where decoders drop a space that stands for nothing."""
        if self._is_bytewise or self._raw_byte(self.token(token_id) or "") is not None:
            return self.token_bytes(token_id)
        return self.decode([token_id]).encode()

    def _plain_token(self) -> list[int]:
        """An ordinary token to stand in front of another, so that this one decodes as in the middle of a text."""
        for token_id in range(self.vocab_size):
            token = self.token(token_id)
            if token is not None and token.isascii() and token.isalpha() and token_id not in self.special_ids:
                return [token_id]
        return []


class Detokenizer:
    """Turns tokens into text piece by piece, at a cost per token that does not grow with the text.

    The pieces joined are what `Tokenizer.decode` gives for all tokens, but for one case: where byte-fallback tokens
    in a row are not valid UTF-8, the library gives U+FFFD for every byte of the row. Here characters that were complete
    have been passed on already; each of the sequences that never complete becomes one U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._is_first = True
        self._pending = b""  # an incomplete character

    def push(self, token_id: int) -> str:
        """Take the next token; returns the characters that are complete now."""
        if token_id in self._skipped or self._tokenizer.token(token_id) is None:
            return ""
        added = self._tokenizer.first_bytes(token_id) if self._is_first else self._tokenizer.token_bytes(token_id)
        self._is_first = False
        data = self._pending + added
        text, n_used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[n_used:]
        return text

    def flush(self) -> str:
        """At the end of the text: U+FFFD for a character that was never completed."""
        text = self._pending.decode(errors="replace")
        self._pending = b""
        return text


def load_tokenizer(model: FlashModel) -> Tokenizer:
    """The tokenizer of a flash file.

    Raises
    ------
    PromptError
        If the file has none.
    """
    content = model.file("tokenizer")
    if content is None:
        raise PromptError(
            "the file has no tokenizer, so it cannot be prompted with text; give token ids, or convert the model again "
            "from a checkpoint with tokenizer.json",
            path=model.path,
        )
    return Tokenizer(content, model.manifest.tokens)


def _decoders(library: tokenizers.Tokenizer) -> Iterator[dict[str, Any]]:
    """The descriptions of the decoder's parts, as tokenizer.json has them."""
    if library.decoder is None:
        return
    description = json.loads(library.decoder.__getstate__())
    yield from description["decoders"] if description["type"] == "Sequence" else [description]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters (bytes_to_unicode in its encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF: Final = _byte_alphabet()


def _unspell(token: str) -> bytes:
    """Bytes of a byte-level token; a token with other characters stands for its own text."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()
