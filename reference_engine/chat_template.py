"""Messages to a prompt, by the chat template that the file carries.

A template is a program by whoever made the model. It is rendered by `reference_engine.template_worker`, a process of
its own with a limit on time, memory and output (`TemplateLimits`), inside jinja2's sandbox, which also limits range().
Where the system does not limit address space (macOS) the limit on memory is the one on time.

Knows: where templates and the texts of special tokens stand. Does not know: how text becomes tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flashfmt import FlashModel
from flashfmt.errors import PromptError
from reference_engine.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""``role``, ``content`` and whatever else a template reads; plain JSON values."""

_WORKER: Final = Path(__file__).with_name("template_worker.py")
_MAX_SOURCE_CHARS: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateLimits:
    """What rendering may take: seconds of wall time, bytes of address space, characters of output."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 29
    output_chars: int = 1 << 24


class ChatTemplate:
    """A chat template with the texts of the special tokens it may write.

    Parameters
    ----------
    source : the template, in Jinja.
    special_tokens : by the names that templates use, such as ``bos_token``.
    path : the file it comes from, for messages.

    Raises
    ------
    PromptError
        If the source is longer than a mebibyte.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        path: Path | None = None,
        limits: TemplateLimits | None = None,
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.path = path
        self.limits = limits or TemplateLimits()
        if len(source) > _MAX_SOURCE_CHARS:
            raise self._error(f"has {len(source)} characters, more than {_MAX_SOURCE_CHARS}")

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation, special tokens spelled out: encode it without adding any.

        Parameters
        ----------
        messages : oldest first. Fields that are None are left out, as transformers does: templates ask whether a field
            is defined.
        add_generation_prompt : end with what the template writes in front of an answer.

        Raises
        ------
        PromptError
            If a message is malformed, the template is faulty, refuses the messages, or exceeds a limit.
        """
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise PromptError("a message is no object with a role", where=f"message {i}", actual=repr(message)[:80])
        variables = {
            **self.special_tokens,
            "messages": [_without_nulls(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        answer = self._ask_worker(variables)
        if "text" in answer:
            return str(answer["text"])
        raise self._error(str(answer["error"]), line=answer["line"])

    def _ask_worker(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            request = json.dumps(
                {
                    "source": self.source,
                    "variables": variables,
                    "max_chars": self.limits.output_chars,
                    "max_bytes": self.limits.memory_bytes,
                }
            )
        except (TypeError, ValueError) as error:
            raise PromptError(f"the messages are not plain JSON values: {error}") from None
        try:
            # -P: the script's own directory, with our modules, must not hide those of the standard library.
            done = subprocess.run(
                [sys.executable, "-P", str(_WORKER)],
                input=request.encode(),
                capture_output=True,
                timeout=self.limits.seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise self._error(f"takes longer than {self.limits.seconds:g} seconds") from None
        if done.returncode != 0:
            last_line = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise self._error(f"ended its process: {last_line or f'exit status {done.returncode}'}")
        answer: Mapping[str, Any] = json.loads(done.stdout)
        return answer

    def _error(self, what: str, *, line: int | None = None) -> PromptError:
        where = "chat template" if line is None else f"chat template, line {line}"
        return PromptError(what, path=self.path, where=where)


def load_chat_template(model: FlashModel, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of a flash file.

    Raises
    ------
    PromptError
        If the file has none, or its JSON files are malformed.
    """
    options = _json_object(model, "tokenizer_config")
    content = model.file("chat_template")
    if content is not None:
        try:
            source = content.decode()
        except UnicodeDecodeError as error:
            raise PromptError(
                "the chat template is not UTF-8", path=model.path, where=f"files/chat_template, byte {error.start}"
            ) from None
    else:
        source = _template_in(options.get("chat_template")) or ""
    if not source:
        raise PromptError(
            "the file has no chat template, so it takes no messages; use `flashfmt run` with a plain prompt",
            path=model.path,
        )
    special_tokens = _special_tokens(tokenizer, _json_object(model, "special_tokens_map"), options)
    return ChatTemplate(source, special_tokens, path=model.path)


def _special_tokens(tokenizer: Tokenizer, *documents: Mapping[str, Any]) -> dict[str, str]:
    """Texts of special tokens by name: the manifest's, overruled by those of the documents, the last one most."""
    eos = tokenizer.tokens.eos
    ids = {"bos_token": tokenizer.tokens.bos, "eos_token": eos[0] if eos else None}
    texts = {name: None if token is None else tokenizer.token(token) for name, token in ids.items()}
    for document in documents:
        for name, value in document.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                texts[name] = text
    return {name: text for name, text in texts.items() if text is not None}


def _without_nulls(message: Message) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}


def _template_in(value: Any) -> str | None:
    """The template in tokenizer_config.json: a string, or the one named "default" in a list."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _json_object(model: FlashModel, role: str) -> Mapping[str, Any]:
    content = model.file(role)
    if content is None:
        return {}
    try:
        document = json.loads(content)
    except ValueError as error:
        raise PromptError(f"malformed JSON: {error}", path=model.path, where=f"files/{role}") from None
    if not isinstance(document, dict):
        raise PromptError("malformed JSON", path=model.path, where=f"files/{role}", expected="an object")
    return document
