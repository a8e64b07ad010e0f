"""The engine: a flash file, a memory ceiling and a backend, put together into something that gives logits.

    plan -> load residents and pinned bundles -> feed token ids -> logits

One sequence at a time: its KV cache is part of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt

import flashfmt
from flashfmt import FlashModel
from flashfmt.encodings import Encoding
from flashfmt.errors import PromptError
from reference_engine.active_bundles import BLOCK_NEURONS
from reference_engine.backends import BackendName, load_backend
from reference_engine.backends.cupy_device import open_cuda_device
from reference_engine.backends.warm_up import release_compiler
from reference_engine.bundle_checksums import Verify
from reference_engine.device_bundles import DeviceBundles
from reference_engine.device_exact import DeviceExactBundles
from reference_engine.device_placement import DeviceOptions, DevicePlacement
from reference_engine.device_ways import WayChoice
from reference_engine.exact_bundles import ExactBundles, model_blocks
from reference_engine.flash_io import IoCounters
from reference_engine.kv_cache import KvCache, KvType, kv_cache_nbytes
from reference_engine.machine import automatic_ceiling, resident_nbytes, trim_heap
from reference_engine.models.decoder_stack import DecoderStack
from reference_engine.plan import FixedParts, MemoryPlan, plan_memory
from reference_engine.resident_encoding import ResidentsChoice
from reference_engine.residents import (
    EMBEDDING,
    FlashTable,
    ResidentTable,
    flash_table,
    load_residents,
    multiplied_encodings,
    residents_file_nbytes,
    residents_nbytes,
)
from reference_engine.sparse_bundles import SparseBundles
from reference_engine.sparse_mode import (
    SparseOptions,
    load_sparse,
    plan_sparse_mode,
    plan_with_residents,
    selector_encodings,
    sparse_load_nbytes,
    sparse_selectors_nbytes,
)
from reference_engine.sparse_plan import SparsePlan

F32 = npt.NDArray[np.float32]
Progress = Callable[[int], None]

DEFAULT_CONTEXT_TOKENS: Final = 2048
PREFILL_TOKENS: Final = 128  # tokens of a prompt computed together; the same at every budget


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to run a model.

    Parameters
    ----------
    memory : ceiling in bytes on everything the process holds; None takes a sensible share of what is free.
    context_tokens : room in the KV cache; None takes the model's own context, at most 2048.
    kv_type : ``f32``, or ``f16`` for half the room.
    backend, n_threads : see `load_backend`.
    verify : check the checksums of what is read never, the first time, or always.
    sparse : leave neurons out, by these options; None computes with all of them.
    residents : hold matrices other than bundles ``stored``, as the file has them, or re-encode them while loading, in
        ``q8`` or ``q4``, which is an approximation. ``auto`` does so in sparse mode, where the plan leaves too little
        for the neuron window otherwise; see `choose_plan`.
    device : ``cpu``, or ``cuda``: weights, activations and arithmetic on a GPU; `backend` and `n_threads` mean nothing.
    vram : with ``cuda``, the ceiling in bytes on everything the process holds there; None takes most of what is free.
    host_memory : with ``cuda``, page-locked bytes that keep bundles which left the device.
    """

    memory: int | None = None
    context_tokens: int | None = None
    kv_type: KvType = "f32"
    backend: BackendName = "auto"
    n_threads: int | None = None
    verify: Verify = "first"
    sparse: SparseOptions | None = None
    residents: ResidentsChoice = "stored"
    device: Literal["cpu", "cuda"] = "cpu"
    vram: int | None = None
    host_memory: int = 0


class Session:
    """One sequence of tokens. `feed` extends it, `truncate` takes it back to an earlier state."""

    def __init__(self, engine: Engine, kv_cache: KvCache) -> None:
        self._engine = engine
        self._kv_cache = kv_cache

    @property
    def n_tokens(self) -> int:
        """Tokens fed so far."""
        return self._kv_cache.n_tokens

    def feed(self, token_ids: Sequence[int]) -> F32:
        """Append tokens; returns float32 [vocab_size], the logits behind the last of them.

        Raises
        ------
        PromptError
            If there are none, one is outside the vocabulary, or they do not fit in the context.
        FlashReadError, ChecksumError
            If weights cannot be read; the sequence is then as it was after the last complete chunk.
        """
        stack = self._engine.stack
        for chunk in self._chunks(token_ids):
            hidden = stack.forward(chunk, self._kv_cache)  # (n_tokens, d_model)
        last: F32 = stack.logits(hidden[-1:])[0]
        return last

    def feed_all(self, token_ids: Sequence[int]) -> F32:
        """Like `feed`, but returns the logits behind every token, [n_tokens, vocab_size]."""
        stack = self._engine.stack
        parts = [stack.logits(stack.forward(chunk, self._kv_cache)) for chunk in self._chunks(token_ids)]
        return np.concatenate(parts)

    def truncate(self, n_tokens: int) -> None:
        """Forget all tokens but the first `n_tokens`."""
        self._kv_cache.truncate(n_tokens)

    def _chunks(self, token_ids: Sequence[int]) -> list[npt.NDArray[np.int64]]:
        self._engine.require_current(self)
        ids = np.asarray(token_ids, np.int64)
        vocab_size, room = self._engine.vocab_size, self._kv_cache.context_tokens - self.n_tokens
        if not len(ids):
            raise PromptError("there are no tokens to feed")
        if ids.min() < 0 or ids.max() >= vocab_size:
            bad = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise PromptError("token id outside the vocabulary", expected=f"0 to {vocab_size - 1}", actual=int(bad))
        if len(ids) > room:
            raise PromptError(
                f"{self.n_tokens + len(ids)} tokens do not fit in the context",
                expected=f"at most {self._kv_cache.context_tokens}",
                actual=self.n_tokens + len(ids),
            )
        return [ids[start : start + PREFILL_TOKENS] for start in range(0, len(ids), PREFILL_TOKENS)]


class Engine:
    """Runs one model under one plan. Build it (which plans), `load` it, `start` sequences, `close` it.

    Parameters
    ----------
    path : a flash file or directory.
    loaded_before_plan : called once the file is open and the kernels are compiled, before memory is planned: what
        it allocates (a tokenizer, say) is counted as part of the process.

    Raises
    ------
    BudgetError
        If the ceiling is below the floor.
    FlashError
        If the file cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        options: EngineOptions | None = None,
        *,
        loaded_before_plan: Callable[[FlashModel], object] | None = None,
    ) -> None:
        self.options = options or EngineOptions()
        self.model = flashfmt.open(path)
        self._bundles: ExactBundles | SparseBundles | DeviceExactBundles | DeviceBundles | None = None
        self._stack: DecoderStack | None = None
        self._kv_cache: KvCache | None = None
        self._session: Session | None = None
        self._flash_table: FlashTable | None = None
        self._at_start = 0  # most that was seen to be held before the plan
        try:
            self.context_tokens = self._choose_context()
            self._placement = self._place()
            if self._placement is None:
                self._backend = load_backend(self.options.backend, self.options.n_threads)
            if loaded_before_plan is not None:
                loaded_before_plan(self.model)
            self.plan = self._plan()
        except BaseException:
            self.model.close()
            raise

    @property
    def vocab_size(self) -> int:
        """Number of tokens the model knows."""
        return self.model.decoder.vocab_size

    @property
    def stack(self) -> DecoderStack:
        """The loaded decoder."""
        if self._stack is None:
            raise RuntimeError("the engine is not loaded")
        return self._stack

    @property
    def load_nbytes(self) -> int:
        """Bytes that `load` reports to its progress callback."""
        bundles = self.plan.pinned if isinstance(self.plan, MemoryPlan) else 0
        if isinstance(self.plan, SparsePlan) and self.options.sparse is not None:
            bundles = sparse_load_nbytes(self.model, self.options.sparse, self.plan.capacities)
        return residents_file_nbytes(self.model) + bundles

    @property
    def exact_plan(self) -> MemoryPlan:
        """The plan of exact mode.

        Raises
        ------
        RuntimeError
            In sparse mode.
        """
        if not isinstance(self.plan, MemoryPlan):
            raise RuntimeError("this engine leaves neurons out: it has no plan for all of them")
        return self.plan

    @property
    def sparse(self) -> SparseBundles | DeviceBundles | None:
        """Where sparse mode's figures are, and can be watched; None in exact mode, and before loading."""
        return self._bundles if isinstance(self._bundles, SparseBundles | DeviceBundles) else None

    @property
    def exact(self) -> ExactBundles | None:
        """Where exact mode's figures are; None in sparse mode, on a device, and before loading."""
        return self._bundles if isinstance(self._bundles, ExactBundles) else None

    @property
    def device_way(self) -> WayChoice | None:
        """How bundles get to the device, and why; None without a device, and in exact mode."""
        return None if self._placement is None else self._placement.way

    def load(self, progress: Progress | None = None) -> None:
        """Read what the plan keeps in DRAM, and start streaming the rest.

        Raises
        ------
        FlashReadError, ChecksumError
        """
        if self._placement is not None:
            loaded = self._placement.load(self.plan, progress)
            self._stack, self._kv_cache, self._bundles = loaded.stack, loaded.kv_cache, loaded.bundles
            self._flash_table = loaded.flash_table
            return
        residents = load_residents(
            self.model,
            encoding=self.plan.fixed.resident_encoding,
            verify=self.options.verify != "never",
            progress=progress,
        )
        trim_heap()  # re-encoding leaves megabytes of freed memory
        self._bundles = self._load_bundles(progress)
        self._flash_table = flash_table(self.model, self._backend)
        tokens = self._flash_table or ResidentTable(residents.matrix(EMBEDDING), self._backend)
        self._kv_cache = KvCache(self.model.decoder, self.context_tokens, self.options.kv_type)
        self._stack = DecoderStack(
            decoder=self.model.decoder,
            residents=residents,
            layers=self.model.layers,
            tokens=tokens,
            bundles=self._bundles,
            backend=self._backend,
        )

    def start(self) -> Session:
        """Begin a new sequence; the one before it can no longer be fed."""
        if self._stack is None or self._kv_cache is None:
            raise RuntimeError("the engine is not loaded")
        self._kv_cache.truncate(0)
        self._session = Session(self, self._kv_cache)
        return self._session

    def require_current(self, session: Session) -> None:
        """Raise RuntimeError if `session` is not the one started last."""
        if session is not self._session:
            raise RuntimeError("another sequence was started since; an engine runs one at a time")

    def counters(self) -> IoCounters:
        """What reading has cost since the engine was built."""
        sources = [source for source in (self._bundles, self._flash_table) if source is not None]
        return sum((source.counters for source in sources), IoCounters())

    def close(self) -> None:
        """Stop reading, release memory and files."""
        for source in (self._bundles, self._flash_table):
            if source is not None:
                source.close()
        self._flash_table = self._bundles = self._stack = self._kv_cache = self._session = None
        self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _place(self) -> DevicePlacement | None:
        """Where a device holds the model; None on the CPU."""
        options = self.options
        if options.device == "cpu":
            if options.vram is not None or options.host_memory:
                raise PromptError("device memory and its second tier are for a device: --device cuda")
            return None
        device_options = DeviceOptions(
            vram=options.vram,
            host_memory=options.host_memory,
            memory=options.memory,
            context_tokens=self.context_tokens,
            prefill_tokens=PREFILL_TOKENS,
            kv_type=options.kv_type,
            verify=options.verify,
            sparse=options.sparse,
            residents=options.residents,
        )
        return DevicePlacement(self.model, open_cuda_device(), device_options)

    def _choose_context(self) -> int:
        own, asked = self.model.decoder.context_tokens, self.options.context_tokens
        if asked is not None and not 1 <= asked <= own:
            raise PromptError("the model has no such context", expected=f"1 to {own} tokens", actual=asked)
        return min(own, DEFAULT_CONTEXT_TOKENS) if asked is None else asked

    def _load_bundles(self, progress: Progress | None) -> ExactBundles | SparseBundles:
        if isinstance(self.plan, SparsePlan) and self.options.sparse is not None:
            sparse = load_sparse(
                self.model,
                self.options.sparse,
                self.plan,
                self._backend,
                verify=self.options.verify,
                progress=progress,
            )
            trim_heap()  # and so does making selectors
            return sparse
        exact = ExactBundles(self.model, self.exact_plan.pinned_blocks, verify=self.options.verify)
        exact.load(progress)
        return exact

    def _plan(self) -> MemoryPlan | SparsePlan:
        if self._placement is not None:
            trim_heap()  # reading a tokenizer leaves megabytes of freed memory
            return self._placement.plan(resident_nbytes())
        options = self.options
        return plan_with_residents(self.model, options.residents, options.sparse, self._plan_exact, self._plan_sparse)

    def _plan_exact(self, residents: Encoding | None) -> MemoryPlan:
        blocks = model_blocks(self.model)
        fixed = self._fixed_parts(residents, scratch=self._scratch_nbytes(max(block.n_neurons for block in blocks)))
        return plan_memory(fixed, blocks, self._ceiling(), self.context_tokens)

    def _plan_sparse(self, sparse: SparseOptions, residents: Encoding | None) -> SparsePlan:
        fixed = self._fixed_parts(
            residents,
            scratch=self._scratch_nbytes(BLOCK_NEURONS) + self._scores_nbytes(),
            selectors=sparse_selectors_nbytes(self.model, sparse),
            multiplied=selector_encodings(sparse),
        )
        return plan_sparse_mode(self.model, sparse, fixed, self._ceiling(), self.context_tokens)

    def _ceiling(self) -> int:
        return self.options.memory if self.options.memory is not None else automatic_ceiling()

    def _fixed_parts(
        self, residents: Encoding | None, *, scratch: int, selectors: int = 0, multiplied: Iterable[Encoding] = ()
    ) -> FixedParts:
        """What is held whatever the ceiling, with residents in that encoding; loads the kernels that it takes.

        Parameters
        ----------
        multiplied : encodings of matrices that are made while loading.
        """
        self._backend.prepare(multiplied_encodings(self.model, residents).union(multiplied))
        self._at_start = max(self._at_start, resident_nbytes())
        trim_heap()  # reading a tokenizer leaves megabytes of freed memory
        release_compiler()
        return FixedParts(
            process=resident_nbytes(),
            residents=residents_nbytes(self.model, residents),
            kv_cache=kv_cache_nbytes(self.model.decoder, self.context_tokens, self.options.kv_type),
            scratch=scratch,
            selectors=selectors,
            at_start=self._at_start,
            resident_encoding=residents,
        )

    def _scores_nbytes(self) -> int:
        """Scores of all neurons for one prefill chunk, as a selector has them: two projections and their product."""
        return 4 * 4 * min(PREFILL_TOKENS, self.context_tokens) * self.model.decoder.ffn.d_ff

    def _scratch_nbytes(self, block_neurons: int) -> int:
        """Float32 activations of one prefill chunk at their widest, and the logits with the sampler's copies."""
        d = self.model.decoder
        a, n_tokens = d.attention, min(PREFILL_TOKENS, self.context_tokens)
        widths = 6 * d.d_model + 2 * (a.n_heads + a.n_kv_heads) * a.head_dim + 3 * block_neurons
        scores = self._backend.n_threads * self.context_tokens
        return 4 * (n_tokens * widths + scores + 6 * d.vocab_size)
