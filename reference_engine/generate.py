"""Generating text: prompt -> logits -> token -> text, until something ends it.

Knows: the order of these steps and the reasons to stop. Does not know: how logits come about (`Model`), what a chat is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from flashfmt.errors import PromptError
from flashfmt.manifest import SpecialTokens
from reference_engine.flash_io import IoCounters
from reference_engine.machine import peak_resident_nbytes
from reference_engine.sampler import Sampler, SamplingOptions
from reference_engine.statistics import CountsIo, RunStatistics
from reference_engine.stop_strings import StopStrings
from reference_engine.tokenizer import Detokenizer, Tokenizer

FinishReason = Literal["eos", "stop", "length", "context"]
"""An end-of-text token, a stop string, as many tokens as asked for, or a full context."""


class Session(Protocol):
    """One sequence with its KV cache."""

    @property
    def n_tokens(self) -> int:
        """Tokens in the KV cache."""
        ...

    def feed(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens; returns float32 [vocab_size], the logits behind the last of them."""
        ...


class Model(CountsIo, Protocol):
    """Something that gives logits."""

    @property
    def vocab_size(self) -> int:
        """Length of the logits."""
        ...

    @property
    def context_tokens(self) -> int:
        """Tokens that a sequence can hold."""
        ...

    def start(self) -> Session:
        """Begin a new sequence."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token brought: the text that became certain with it, often none.

    The last piece has no token where text was still held back at the end.
    """

    token_id: int | None
    text: str


class Generation:
    """A running generation: iterate over it once for its `Piece`s; what came of it so far can be read at any time.

    `generate` makes it, and says what goes in.
    """

    def __init__(
        self,
        model: Model,
        session: Session,
        prompt_ids: Sequence[int],
        *,
        sampler: Sampler,
        detokenizer: Detokenizer | None,
        stop: StopStrings,
        eos: frozenset[int],
        max_tokens: int | None,
    ) -> None:
        self.session = session
        self.prompt_ids = tuple(prompt_ids)
        self.token_ids: list[int] = []
        """Tokens generated, an end-of-text token included. The session does not hold the last one yet."""
        self.finish_reason: FinishReason | None = None
        """None until the end is reached."""
        self._model = model
        self._sampler = sampler
        self._detokenizer = detokenizer
        self._stop = stop
        self._eos = eos
        self._max_tokens = max_tokens
        self._texts: list[str] = []
        self._seconds = self._first_seconds = 0.0
        self._io_before = model.counters()
        self._io = self._first_io = IoCounters()
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    @property
    def text(self) -> str:
        """All text so far: the pieces joined."""
        return "".join(self._texts)

    @property
    def statistics(self) -> RunStatistics:
        """What it has cost so far."""
        return RunStatistics(
            prompt_tokens=len(self.prompt_ids),
            generated_tokens=len(self.token_ids),
            first_token_seconds=self._first_seconds,
            total_seconds=self._seconds,
            io=self._io,
            decode_io=self._io - self._first_io,
            peak_memory_bytes=peak_resident_nbytes(),
        )

    def _run(self) -> Iterator[Piece]:
        for token in self.prompt_ids:
            self._sampler.accept(token)
        fed: Sequence[int] = self.prompt_ids
        while self.finish_reason is None:
            token, text = self._step(fed)
            fed = (token,)
            if self.finish_reason != "eos":
                yield self._passed_on(token, text)
        held = self._held_back()
        if held:
            yield self._passed_on(None, held)

    def _step(self, fed: Sequence[int]) -> tuple[int, str]:
        """Feed tokens, choose the next; returns it with its text. Sets the reason to stop if there is one."""
        began = time.perf_counter()
        token = self._sampler.sample(self.session.feed(fed))
        self._sampler.accept(token)
        text = ""
        if token in self._eos:
            self.finish_reason = "eos"
        elif self._detokenizer is not None:
            text = self._stop.push(self._detokenizer.push(token))
        self.token_ids.append(token)
        if self.finish_reason is None:
            self.finish_reason = self._reason_to_stop()
        self._seconds += time.perf_counter() - began
        self._io = self._model.counters() - self._io_before
        if len(self.token_ids) == 1:
            self._first_seconds, self._first_io = self._seconds, self._io
        return token, text

    def _reason_to_stop(self) -> FinishReason | None:
        if self._stop.matched is not None:
            return "stop"
        if self._max_tokens is not None and len(self.token_ids) >= self._max_tokens:
            return "length"
        return "context" if self.session.n_tokens >= self._model.context_tokens else None

    def _held_back(self) -> str:
        """Text that waited for more: an incomplete character, the beginning of a stop string."""
        text = self._stop.push(self._detokenizer.flush()) if self._detokenizer is not None else ""
        return text + self._stop.flush()

    def _passed_on(self, token: int | None, text: str) -> Piece:
        self._texts.append(text)
        return Piece(token, text)


def generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompt_ids: Sequence[int],
    *,
    sampling: SamplingOptions,
    max_tokens: int | None,
    stop: Iterable[str] = (),
    ignore_eos: bool = False,
    show_special_tokens: bool = False,
    tokens: SpecialTokens | None = None,
    session: Session | None = None,
) -> Generation:
    """Check the request and make a `Generation`; nothing is computed until it is iterated over.

    Parameters
    ----------
    tokenizer : makes the text; None gives token ids only.
    prompt_ids : an empty prompt is the bos token, where there is one.
    max_tokens : None goes on until something else ends it.
    stop : see `StopStrings`; the text ends before it.
    ignore_eos : treat end-of-text tokens as any other token.
    show_special_tokens : put special tokens in the text.
    tokens : the roles of token ids; by default the tokenizer's.
    session : a sequence to go on with; `prompt_ids` are then what is appended to it, and all that penalties look at. By
        default a new one.

    Raises
    ------
    PromptError
        If the prompt is empty, too long, or not of the vocabulary; if `max_tokens` is below 1; if a stop string is
        empty or there is no tokenizer to find it with.
    """
    if tokens is None:
        tokens = tokenizer.tokens if tokenizer is not None else SpecialTokens()
    stop_strings = StopStrings(stop)
    if stop_strings.stops and tokenizer is None:
        raise PromptError("stop strings need a tokenizer, and the file has none")
    if max_tokens is not None and max_tokens < 1:
        raise PromptError("too few tokens to generate", expected="at least 1", actual=max_tokens)
    n_past = 0 if session is None else session.n_tokens
    prompt_ids = tuple(prompt_ids)
    if not prompt_ids and n_past == 0 and tokens.bos is not None:
        prompt_ids = (tokens.bos,)
    _check_prompt(model, prompt_ids, n_past)
    return Generation(
        model,
        model.start() if session is None else session,
        prompt_ids,
        sampler=Sampler(sampling, model.vocab_size),
        detokenizer=None if tokenizer is None else tokenizer.stream(skip_special_tokens=not show_special_tokens),
        stop=stop_strings,
        eos=frozenset() if ignore_eos else frozenset(tokens.eos),
        max_tokens=max_tokens,
    )


def _check_prompt(model: Model, prompt_ids: Sequence[int], n_past: int) -> None:
    if not prompt_ids:
        raise PromptError("the prompt is empty, and the model has no token that begins a text")
    for place, token in enumerate(prompt_ids):
        if not 0 <= token < model.vocab_size:
            raise PromptError(
                "token id outside the vocabulary",
                where=f"token {place} of the prompt",
                expected=f"0 to {model.vocab_size - 1}",
                actual=token,
            )
    if n_past + len(prompt_ids) > model.context_tokens:
        length = f"the prompt has {len(prompt_ids)} tokens"
        if n_past:
            length += f" after {n_past} that came before"
        raise PromptError(
            f"{length}, too many for the context of {model.context_tokens}",
            expected=f"at most {model.context_tokens}",
            actual=n_past + len(prompt_ids),
        )
