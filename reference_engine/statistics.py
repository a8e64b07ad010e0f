"""What a run has cost: tokens, time, flash reads, memory. Values that are returned, never printed here.

Knows: the figures of one run and how they are worded. Does not know: who measured them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from reference_engine.flash_io import IoCounters
from reference_engine.sizes import format_size


class CountsIo(Protocol):
    """Something that tells what its flash reads have cost so far."""

    def counters(self) -> IoCounters:
        """A snapshot; two of them subtract."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatistics:
    """The figures of one run.

    Times are of the engine's work: what the receiver of the text does between two tokens is not in them.

    Parameters
    ----------
    prompt_tokens, generated_tokens : generated ones include an end-of-text token.
    first_token_seconds : from the start of the prompt to the first token.
    total_seconds : of prompt and all tokens.
    io, decode_io : flash reads of the whole run, and of the tokens after the first.
    peak_memory_bytes : most bytes that the process ever had in DRAM.
    """

    prompt_tokens: int
    generated_tokens: int
    first_token_seconds: float
    total_seconds: float
    io: IoCounters
    decode_io: IoCounters
    peak_memory_bytes: int

    @property
    def n_decode_steps(self) -> int:
        """Tokens after the first: each took one step of the decoder for itself."""
        return max(self.generated_tokens - 1, 0)

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed up to the first token; 0 where there was none."""
        return _ratio(self.prompt_tokens, self.first_token_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, the first token excluded; 0 where there was no second one."""
        return _ratio(self.n_decode_steps, self.total_seconds - self.first_token_seconds)

    @property
    def bytes_read_per_token(self) -> float:
        """Flash bytes read per token after the first; 0 where there was no second one."""
        return _ratio(self.decode_io.bytes_read, self.n_decode_steps)

    @property
    def io_wait_share(self) -> float:
        """Share of the time, 0 to 1, that compute stood waiting for flash."""
        return _ratio(self.io.wait_seconds, self.total_seconds)

    def as_dict(self) -> dict[str, int | float]:
        """All figures under names that carry their unit, for JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "first_token_seconds": self.first_token_seconds,
            "total_seconds": self.total_seconds,
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
            "bytes_read": self.io.bytes_read,
            "bytes_read_per_token": self.bytes_read_per_token,
            "read_requests": self.io.n_requests,
            "io_wait_seconds": self.io.wait_seconds,
            "io_wait_share": self.io_wait_share,
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def rows(self) -> list[tuple[str, str]]:
        """(label, value with its unit) of each figure, for people."""
        return [
            ("prompt", f"{self.prompt_tokens} tokens"),
            ("first token after", f"{self.first_token_seconds:.2f} s ({self.prompt_tokens_per_second:.1f} tokens/s)"),
            ("generated", f"{self.generated_tokens} tokens in {self.total_seconds:.2f} s"),
            ("speed after the first", f"{self.tokens_per_second:.2f} tokens/s"),
            ("read from flash", f"{format_size(self.io.bytes_read)} in {self.io.n_requests} requests"),
            ("read per token", format_size(self.bytes_read_per_token)),
            ("waiting for flash", f"{self.io.wait_seconds:.2f} s ({self.io_wait_share:.0%})"),
            ("peak memory", format_size(self.peak_memory_bytes)),
        ]


def _ratio(amount: float, per: float) -> float:
    return amount / per if per > 0 else 0.0
