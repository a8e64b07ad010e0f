"""Where bytes lie: the constants of SPEC.md and the arithmetic of a bundles payload. Pure; no I/O.

Implements SPEC.md sections "Bundles" and "Limits". Offsets and sizes are bytes; ranges are half-open.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARD_INDEX_ENTRY_BYTES = 16
SHARD_INDEX_CHECKSUM_BYTES = 4

MIN_ALIGNMENT = 64
MAX_ALIGNMENT = 32768
DEFAULT_ALIGNMENT = 4096
TIGHT_ALIGNMENT = 512
MAX_PADDING_SHARE = 1 / 8

PAYLOAD_ALIGNMENT = 64
BUNDLES_FILE_ALIGNMENT = 16384

MAX_ENTRIES = 1 << 20
MAX_DIRECTORY_BYTES = 256 << 20
MAX_NAME_BYTES = 1024
MAX_METADATA_BYTES = 1 << 20
MAX_JSON_DEPTH = 32
MAX_LAYERS = 10_000
MAX_NEURONS = 1 << 24
MAX_ROW_BYTES = 16 << 20
MAX_DIMENSION = 1 << 31
MAX_EMBEDDED_FILE_BYTES = 256 << 20


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def choose_alignment(row_nbytes: int) -> int:
    """Alignment a writer gives to bundles of `row_nbytes`: 4096, or 512 where padding would exceed 1/8 of a row."""
    padding = round_up(row_nbytes, DEFAULT_ALIGNMENT) - row_nbytes
    return DEFAULT_ALIGNMENT if padding <= row_nbytes * MAX_PADDING_SHARE else TIGHT_ALIGNMENT


@dataclass(frozen=True, slots=True)
class BundleGeometry:
    """Placement of the bundles of one layer inside their payload (SPEC.md, "Bundles").

    Bundle `i` occupies ``[i * stride, i * stride + row_nbytes)`` of the payload; zeros fill the rest of its stride.
    The shard index follows the last stride.
    """

    n_neurons: int
    row_nbytes: int
    stride: int
    alignment: int

    @classmethod
    def for_rows(cls, n_neurons: int, row_nbytes: int, alignment: int | None = None) -> BundleGeometry:
        """Geometry a writer uses: `alignment` as given or chosen, stride the row rounded up to it."""
        alignment = choose_alignment(row_nbytes) if alignment is None else alignment
        return cls(n_neurons, row_nbytes, round_up(row_nbytes, alignment), alignment)

    @property
    def index_offset(self) -> int:
        """Offset of the shard index in the payload."""
        return self.n_neurons * self.stride

    @property
    def index_nbytes(self) -> int:
        """Size of the shard index with its trailing CRC-32C."""
        return self.n_neurons * SHARD_INDEX_ENTRY_BYTES + SHARD_INDEX_CHECKSUM_BYTES

    @property
    def payload_nbytes(self) -> int:
        """Size of the whole payload: strides, then index."""
        return self.index_offset + self.index_nbytes

    def bundle_range(self, neuron: int) -> tuple[int, int]:
        """Half-open byte range of a bundle's data inside the payload."""
        if not 0 <= neuron < self.n_neurons:
            raise IndexError(f"neuron {neuron} outside [0, {self.n_neurons})")
        start = neuron * self.stride
        return start, start + self.row_nbytes
