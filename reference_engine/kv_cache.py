"""Keys and values of the tokens so far, for all layers, allocated once at their full size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from flashfmt.manifest import Decoder

KvType = Literal["f32", "f16"]
KV_DTYPES: Final[dict[KvType, np.dtype[Any]]] = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}


def kv_cache_nbytes(decoder: Decoder, context_tokens: int, kv_type: KvType) -> int:
    """Bytes of a cache for `context_tokens` tokens."""
    a = decoder.attention
    return 2 * decoder.n_layers * a.n_kv_heads * context_tokens * a.head_dim * KV_DTYPES[kv_type].itemsize


class KvCache:
    """`keys` and `values` of a layer are [n_kv_heads, context_tokens, head_dim]; the first `n_tokens` are valid.

    `zeros` makes the array that holds them all, from a shape and a dtype.
    """

    def __init__(
        self, decoder: Decoder, context_tokens: int, kv_type: KvType = "f32", zeros: Callable[..., Any] = np.zeros
    ) -> None:
        a = decoder.attention
        shape = (2, decoder.n_layers, a.n_kv_heads, context_tokens, a.head_dim)
        self._data: npt.NDArray[Any] = zeros(shape, KV_DTYPES[kv_type])
        self.context_tokens = context_tokens
        self.n_tokens = 0

    def append(self, layer: int, keys: npt.NDArray[np.float32], values: npt.NDArray[np.float32]) -> None:
        """Store [n_new, n_kv_heads, head_dim] behind the valid tokens of a layer; `advance` makes them valid."""
        new = slice(self.n_tokens, self.n_tokens + len(keys))
        self._data[0, layer, :, new] = keys.swapaxes(0, 1)
        self._data[1, layer, :, new] = values.swapaxes(0, 1)

    def layer(self, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Views of all keys and all values of a layer."""
        return self._data[0, layer], self._data[1, layer]

    def layers(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Views of all keys and all values, [n_layers, n_kv_heads, context_tokens, head_dim]."""
        return self._data[0], self._data[1]

    def advance(self, n_new: int) -> None:
        """Count `n_new` appended tokens as valid."""
        self.n_tokens += n_new

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first `n_tokens`."""
        if not 0 <= n_tokens <= self.n_tokens:
            raise ValueError(f"cannot keep {n_tokens} of {self.n_tokens} tokens")
        self.n_tokens = n_tokens
