"""Other Zarr implementations read the same values as we do."""

import asyncio
import pickle

import numpy as np
import pytest
import zarr
from numcodecs import Blosc, Zstd
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

import flashfmt
from flashfmt.zarr_store import FlashStore

ENCODINGS = ["f32", "f16", "bf16", "q8", "q4"]


@pytest.fixture
def with_compressed(tiny):
    """Model of an encoding with one zstd and one blosc tensor."""

    def build(encoding):
        model = tiny(encoding, residents="f16")
        array = model.arrays["embedding/tokens"]
        array.document["codecs"].append({"name": "zstd", "configuration": {"level": 3, "checksum": False}})
        array.replace(Zstd(3).encode(array.payload))
        array = model.arrays["logits/weight"]
        blosc = {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": 2, "blocksize": 0}
        array.document["codecs"].append({"name": "blosc", "configuration": blosc})
        array.replace(Blosc("lz4", 5, Blosc.SHUFFLE).encode(np.frombuffer(array.payload, "<u2")))
        return model

    return build


def expected_values(model):
    """Every array in storage form, through flashfmt."""
    for name in model.tensors:
        yield name, model.tensor(name, verify=True).data
    for info in model.layers:
        bundles = model.bundles(info.layer)
        yield info.name, np.stack([bundles.bundle(i) for i in range(info.geometry.n_neurons)])
    for role in model.files:
        yield f"files/{role}", np.frombuffer(model.file(role), np.uint8)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zarr_python_reads_every_array(with_compressed, tmp_path, container, encoding):
    path = with_compressed(encoding).write(tmp_path / "tiny.flash", container)
    group = zarr.open_group(FlashStore(path) if container == "file" else path, mode="r")
    assert group.attrs["flashfmt"]["name"] == "tiny"
    with flashfmt.open(path) as model:
        model.verify()
        for name, values in expected_values(model):
            read = group[name][...]
            assert read.dtype == values.dtype
            np.testing.assert_array_equal(read.view(np.uint8), values.view(np.uint8))
        assert {name for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)} == {
            *model.tensors,
            *(info.name for info in model.layers),
            *(f"files/{role}" for role in model.files),
        }


@pytest.mark.parametrize("encoding", ["f16", "q4"])
def test_tensorstore_reads_every_array_of_a_directory(with_compressed, tmp_path, encoding):
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is a test dependency")
    path = with_compressed(encoding).write_directory(tmp_path / "tiny")
    with flashfmt.open(path) as model:
        for name, values in expected_values(model):
            store = {"driver": "file", "path": str(path / name)}
            read = np.asarray(tensorstore.open({"driver": "zarr3", "kvstore": store}).result().read().result())
            np.testing.assert_array_equal(read.view(np.uint8), values.view(np.uint8))


def test_ranges_of_a_key(model, tmp_path):
    store = FlashStore(model.write_file(tmp_path / "tiny.flash"))
    payload = model.arrays["final_norm/weight"].payload
    prototype = default_buffer_prototype()

    def read(request):
        return asyncio.run(store.get("final_norm/weight/c/0", prototype, request)).to_bytes()

    assert read(None) == payload
    assert read(RangeByteRequest(3, 9)) == payload[3:9]
    assert read(RangeByteRequest(250, 900)) == payload[250:]
    assert read(OffsetByteRequest(200)) == payload[200:]
    assert read(SuffixByteRequest(7)) == payload[-7:]
    assert read(SuffixByteRequest(7000)) == payload
    assert store.get_sync("nothing") is None


def test_the_store_is_read_only_and_travels(model, tmp_path):
    store = FlashStore(model.write_file(tmp_path / "tiny.flash"))
    assert store.read_only
    assert pickle.loads(pickle.dumps(store)) == store
    assert store != FlashStore(model.write_file(tmp_path / "other.flash"))
    with pytest.raises(NotImplementedError):
        asyncio.run(store.delete("zarr.json"))
    store.close()
    with pytest.raises(flashfmt.FlashError, match="closed"):
        store.get_sync("zarr.json")
