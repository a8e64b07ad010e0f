"""Compression gives what the reader takes, and says so where it cannot."""

import numpy as np
import pytest

from flashfmt.compression import compress
from flashfmt.container import Extent
from flashfmt.encodings import Encoding
from flashfmt.errors import FlashError
from flashfmt.tensor import TensorInfo, decompress


@pytest.mark.parametrize("codec", ["zstd", "blosc"])
def test_a_constant_tensor_is_refused_where_the_reader_would_refuse_it(codec):
    values = np.zeros((17 << 20) // 4, np.float32)
    with pytest.raises(FlashError, match=r"layers/0/x: .*store it raw \(expected at most \d+ bytes, got 17825792"):
        compress(values, codec, "layers/0/x")


@pytest.mark.parametrize("codec", ["zstd", "blosc"])
def test_a_small_constant_tensor_and_a_large_sparse_one_come_back(codec, tmp_path):
    sparse = np.zeros((17 << 20) // 4, np.float32)
    sparse[::37] = np.random.default_rng(0).standard_normal(len(sparse[::37]))
    for values in (np.zeros(1 << 20, np.float32), sparse):
        stored = compress(values, codec, "x")
        extent = Extent(tmp_path / "m.flash", 0, stored.nbytes)
        info = TensorInfo("x", Encoding.F32, values.shape, values.shape, extent, codec, 0)
        assert decompress(info, stored).tobytes() == values.tobytes()
