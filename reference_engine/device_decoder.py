"""A decoder whose weights, activations and KV cache lie on a device; token ids go in, logits come out on the host.

Knows: where things lie. Does not know: the order of the arithmetic (`models`), how bundles get there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from flashfmt import FlashModel
from flashfmt.encodings import Encoding
from flashfmt.manifest import Decoder
from reference_engine.backends.cupy_backend import CupyBackend
from reference_engine.backends.cupy_protocol import DeviceArray
from reference_engine.kv_cache import KvCache, KvType
from reference_engine.models.decoder_stack import DecoderStack, Rotation
from reference_engine.residents import Residents, load_tensors, resident_tensors

F32 = npt.NDArray[np.float32]


class DeviceResidents(Residents):
    """Resident tensors on the device, but for rotary frequencies, which lie on the host."""

    def __init__(
        self,
        model: FlashModel,
        backend: CupyBackend,
        *,
        encoding: Encoding | None = None,
        verify: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        on_device: dict[str, DeviceArray] = {}
        for info in resident_tensors(model):
            loaded = load_tensors(model, [info.name], encoding=encoding, verify=verify, progress=progress)
            host = loaded[info.name]
            is_angle = info.name.startswith("rotary/")  # the host computes sines and cosines
            on_device[info.name] = host.copy() if is_angle else backend.device.upload(host)
        super().__init__(model, on_device, encoding)


class DeviceKvCache(KvCache):
    """`KvCache` on the device."""

    def __init__(self, decoder: Decoder, context_tokens: int, kv_type: KvType, backend: CupyBackend) -> None:
        super().__init__(decoder, context_tokens, kv_type, zeros=backend.device.zeros)
        self._backend = backend

    def append(self, layer: int, keys: F32, values: F32) -> None:
        """See `KvCache.append`; one launch."""
        self._backend.append_kv(keys, values, *self.layer(layer), self.n_tokens)


class DeviceStack(DecoderStack):
    """`DecoderStack` over device arrays."""

    def logits(self, hidden: F32) -> F32:
        """float32 [n_tokens, vocab_size] on the host."""
        return self._device_backend.device.download(super().logits(hidden)).astype(np.float32, copy=False)

    @property
    def _device_backend(self) -> CupyBackend:
        if not isinstance(self._backend, CupyBackend):
            raise TypeError(f"a device's decoder needs a device's backend, not {self._backend.name}")
        return self._backend

    def _rotations(self, positions: npt.NDArray[np.int64]) -> list[Rotation]:
        upload = self._device_backend.device.upload
        return [Rotation(upload(rotation.cos), upload(rotation.sin)) for rotation in super()._rotations(positions)]
