"""Where a model lies when a device runs it: the plan for a ceiling on device memory, and loading by that plan.

The ceiling on device memory (`--vram`) means the same as that on DRAM: everything that the process holds there. It is
split by the same planners, refused below the floor, and nothing is allocated beyond it.

Knows: how the parts of a device's engine fit together. Does not know: their insides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from flashfmt import FlashModel
from flashfmt.encodings import Encoding
from flashfmt.errors import BudgetError, PromptError
from flashfmt.manifest import Decoder
from reference_engine.active_bundles import BLOCK_NEURONS
from reference_engine.backends.cupy_backend import CupyBackend, attention_stretches
from reference_engine.backends.cupy_protocol import Device
from reference_engine.backends.numpy_backend import NumpyBackend
from reference_engine.bundle_checksums import Verify
from reference_engine.device_bundles import DeviceBundles, landing_nbytes
from reference_engine.device_decoder import DeviceKvCache, DeviceResidents, DeviceStack
from reference_engine.device_exact import DeviceExactBundles
from reference_engine.device_selectors import load_device_selectors
from reference_engine.device_ways import WayChoice, choose_way
from reference_engine.exact_bundles import model_blocks
from reference_engine.flash_io import IO_ALIGNMENT
from reference_engine.kv_cache import KvType, kv_cache_nbytes
from reference_engine.plan import RING_SLOTS, FixedParts, MemoryPlan, plan_memory
from reference_engine.resident_encoding import ResidentsChoice
from reference_engine.residents import (
    EMBEDDING,
    FlashTable,
    ResidentTable,
    flash_table,
    resident_tensors,
    residents_nbytes,
    tensors_nbytes,
)
from reference_engine.selectors import SelectorChoice, TappedSelector
from reference_engine.sizes import format_size
from reference_engine.sparse_mode import (
    SparseOptions,
    bundle_opener,
    load_with_hints,
    plan_sparse_mode,
    plan_with_residents,
    sparse_selectors_nbytes,
    starting_tokens,
)
from reference_engine.sparse_plan import SparsePlan

F32 = npt.NDArray[np.float32]
Progress = Callable[[int], None]

CONTEXT_NBYTES: Final = 512 << 20  # what the driver takes for a process, where a device cannot tell
_FREE_SHARE: Final = 0.9  # of the device's free memory, where no ceiling is given


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """How a device runs a model: `EngineOptions`, as far as they concern it.

    Parameters
    ----------
    vram : ceiling in bytes on everything the process holds on the device; None takes most of what is free.
    host_memory : page-locked bytes for bundles that left the device; sparse mode only.
    memory : ceiling on what the process holds in DRAM; None for none.
    """

    vram: int | None
    host_memory: int
    memory: int | None
    context_tokens: int
    prefill_tokens: int
    kv_type: KvType
    verify: Verify
    sparse: SparseOptions | None
    residents: ResidentsChoice


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What an engine feeds tokens through."""

    stack: DeviceStack
    kv_cache: DeviceKvCache
    bundles: DeviceExactBundles | DeviceBundles
    flash_table: FlashTable | None
    """The token embedding, where it stays on flash; to be closed."""


class DevicePlacement:
    """Plans and loads a model on one device.

    Attributes
    ----------
    way : how bundles get to the device, and why; None in exact mode, where they land in page-locked memory.
    context_nbytes : of device memory, that driver and libraries take for the process; part of every ceiling.

    Raises
    ------
    PromptError
        If the options do not go together on a device.
    BudgetError, FlashReadError
        See `choose_way`.
    """

    def __init__(self, model: FlashModel, device: Device, options: DeviceOptions) -> None:
        if options.host_memory and options.sparse is None:
            raise PromptError("a second tier in host memory is for a selector's bundles: exact mode keeps none")
        self._model = model
        self._device = device
        self._options = options
        self.backend = CupyBackend(device)
        known = device.context_nbytes
        self.context_nbytes = CONTEXT_NBYTES if known is None else known
        self.way: WayChoice | None = None
        if options.sparse is not None:
            self.way = choose_way(model, device, options.sparse.open_reader or bundle_opener(model), options.verify)
            self.context_nbytes += self.way.device_nbytes

    def plan(self, process_nbytes: int) -> MemoryPlan | SparsePlan:
        """Split the ceiling on device memory.

        Parameters
        ----------
        process_nbytes : what the process holds in DRAM already.

        Raises
        ------
        BudgetError
            If a ceiling, or the device's free memory, is below what is needed; names the smallest that works.
        """
        model, options = self._model, self._options
        free, _ = self._device.memory()
        available = free + self.context_nbytes  # the context is there already
        ceiling = self.context_nbytes + int(free * _FREE_SHARE) if options.vram is None else options.vram
        if ceiling > available:
            raise BudgetError(
                f"{format_size(ceiling)} of device memory are asked for, but {format_size(free)} are free",
                expected=f"at most {available} bytes",
                actual=ceiling,
            )
        self._require_dram(process_nbytes)
        return plan_with_residents(
            model,
            options.residents,
            options.sparse,
            partial(self._plan_exact, ceiling),
            partial(self._plan_sparse, ceiling),
        )

    def _plan_exact(self, ceiling: int, residents: Encoding | None) -> MemoryPlan:
        fixed = self._fixed_parts(residents, self._model.decoder.ffn.d_ff)  # pinned neighbours are computed together
        return plan_memory(fixed, model_blocks(self._model), ceiling, self._options.context_tokens)

    def _plan_sparse(self, ceiling: int, sparse: SparseOptions, residents: Encoding | None) -> SparsePlan:
        fixed = self._fixed_parts(residents, BLOCK_NEURONS)
        scores = 8 * self._n_prefill_tokens * self._model.decoder.ffn.d_ff
        selectors = sparse_selectors_nbytes(self._model, sparse)
        fixed = replace(fixed, scratch=fixed.scratch + scores, selectors=selectors)
        return plan_sparse_mode(self._model, sparse, fixed, ceiling, self._options.context_tokens)

    def _fixed_parts(self, residents: Encoding | None, block_neurons: int) -> FixedParts:
        """What is held whatever the ceiling, but for selectors."""
        decoder, n_context = self._model.decoder, self._options.context_tokens
        scratch = _scratch_nbytes(decoder, self._n_prefill_tokens, n_context, block_neurons)
        return FixedParts(
            process=self.context_nbytes,
            residents=residents_nbytes(self._model, residents),
            kv_cache=kv_cache_nbytes(decoder, n_context, self._options.kv_type),
            scratch=scratch + self._landing_nbytes(),
            resident_encoding=residents,
        )

    @property
    def _n_prefill_tokens(self) -> int:
        return min(self._options.prefill_tokens, self._options.context_tokens)

    def load(self, plan: MemoryPlan | SparsePlan, progress: Progress | None = None) -> LoadedModel:
        """Copy to the device what the plan keeps there.

        Raises
        ------
        FlashReadError, ChecksumError
        """
        model, options, backend = self._model, self._options, self.backend
        self._device.limit(plan.ceiling - self.context_nbytes)
        residents = DeviceResidents(
            model,
            backend,
            encoding=plan.fixed.resident_encoding,
            verify=options.verify != "never",
            progress=progress,
        )
        kv_cache = DeviceKvCache(model.decoder, options.context_tokens, options.kv_type, backend)
        bundles = self._load_bundles(plan, progress)
        table = flash_table(model, NumpyBackend())
        tokens = (
            ResidentTable(residents.matrix(EMBEDDING), backend)
            if table is None
            else _UploadedTable(table, self._device)
        )
        stack = DeviceStack(
            decoder=model.decoder,
            residents=residents,
            layers=model.layers,
            tokens=tokens,
            bundles=bundles,
            backend=backend,
        )
        return LoadedModel(stack, kv_cache, bundles, table)

    def _load_bundles(
        self, plan: MemoryPlan | SparsePlan, progress: Progress | None
    ) -> DeviceExactBundles | DeviceBundles:
        model, options, sparse = self._model, self._options, self._options.sparse
        if isinstance(plan, SparsePlan) and sparse is not None:
            return self._load_sparse(plan, sparse, progress)
        if not isinstance(plan, MemoryPlan):
            raise TypeError("a plan for leaving neurons out needs a selector")
        exact = DeviceExactBundles(
            model, self._device, plan.pinned_blocks, open_reader=bundle_opener(model), verify=options.verify
        )
        try:
            exact.load(progress)
        except BaseException:
            exact.close()
            raise
        return exact

    def _load_sparse(self, plan: SparsePlan, sparse: SparseOptions, progress: Progress | None) -> DeviceBundles:
        """`sparse_mode.load_sparse` on a device."""
        model, options = self._model, self._options
        selectors, hints = load_with_hints(sparse, self._load_selectors, progress)
        n_neurons = model.decoder.ffn.d_ff
        bundles = DeviceBundles(
            model,
            self._device,
            selectors=selectors,
            hints=hints,
            windows=[sparse.window.build(n_neurons, capacity) for capacity in plan.capacities],
            capacities=plan.capacities,
            tier_capacities=tier_capacities(model, options.host_memory),
            open_reader=sparse.open_reader or bundle_opener(model),
            open_direct=None if self.way is None else self.way.open_direct,
            overlap=sparse.overlap,
            verify=options.verify,
        )
        try:
            for layer, tokens in starting_tokens(model, sparse, plan.capacities):
                bundles.preload(layer, tokens, progress)
        except BaseException:
            bundles.close()
            raise
        return bundles

    def _load_selectors(self, choice: SelectorChoice, progress: Progress | None) -> list[TappedSelector]:
        return load_device_selectors(self._model, choice, self.backend, verify=self._options.verify, progress=progress)

    def _landing_nbytes(self) -> int:
        if self._options.sparse is not None:
            return landing_nbytes([info.geometry.stride for info in self._model.layers])
        return RING_SLOTS * (max(block.nbytes for block in model_blocks(self._model)) + IO_ALIGNMENT)

    def _require_dram(self, process_nbytes: int) -> None:
        """Refuse a ceiling on DRAM that page-locked memory and loading would exceed."""
        largest = max(tensors_nbytes(self._model, [info.name]) for info in resident_tensors(self._model))
        needed = process_nbytes + self._landing_nbytes() + self._options.host_memory + largest
        if self._options.memory is not None and needed > self._options.memory:
            raise BudgetError(
                f"{format_size(self._options.memory)} of DRAM is not enough beside the device; the smallest that works "
                f"is {format_size(needed)}",
                expected=f"at least {needed} bytes",
                actual=self._options.memory,
            )


class _UploadedTable:
    """A `Table` of the host whose rows are copied to the device."""

    def __init__(self, table: FlashTable, device: Device) -> None:
        self._table = table
        self._device = device

    def rows(self, ids: npt.NDArray[np.int64]) -> F32:
        """float32 [len(ids), width] on the device."""
        rows: F32 = self._device.upload(self._table.rows(ids))
        return rows


def tier_capacities(model: FlashModel, nbytes: int) -> list[int] | None:
    """Slots of each layer in `nbytes` of page-locked memory, shared evenly; None where there are none."""
    strides = [info.geometry.stride for info in model.layers]
    n_slots = min(nbytes // sum(strides), model.decoder.ffn.d_ff)
    return [n_slots] * len(strides) if n_slots else None


def _scratch_nbytes(decoder: Decoder, n_tokens: int, context_tokens: int, block_neurons: int) -> int:
    """Most device memory that activations take while `n_tokens` tokens are computed together, logits included.

    What was freed stays with the allocator in pieces, so twice of what is in use at once is counted.
    """
    a, d_model = decoder.attention, decoder.d_model
    width = (a.n_heads + 2 * a.n_kv_heads) * a.head_dim
    stretches = attention_stretches(n_tokens, context_tokens)
    attention = n_tokens * (2 * width + a.n_heads * stretches * (a.head_dim + 2))
    n_blocks = -(-decoder.ffn.d_ff // 64)
    ffn = max(2 * n_tokens * block_neurons, 8 * (decoder.ffn.d_ff + n_blocks * d_model))
    logits = 2 * n_tokens * decoder.vocab_size
    return 2 * 4 * (6 * n_tokens * d_model + max(attention, ffn, logits))
