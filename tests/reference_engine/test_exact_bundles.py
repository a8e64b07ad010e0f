import os

import numpy as np
import pytest

import flashfmt
from flashfmt.errors import ChecksumError, FlashReadError
from reference_engine import bundle_blocks
from reference_engine.exact_bundles import ExactBundles, model_blocks


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(bundle_blocks, "BLOCK_BYTES", 64 << 10)


def passes(source, model, n):
    for _ in range(n):
        for layer, info in enumerate(model.layers):
            seen = 0
            for block in source.blocks(layer):
                assert block.neurons.start == seen
                expected = model.bundles(layer).rows[block.neurons]
                np.testing.assert_array_equal(block.rows[:, : info.geometry.row_nbytes], expected)
                seen = block.neurons.stop
            assert seen == info.geometry.n_neurons


@pytest.mark.parametrize("container", ["file", "directory"])
@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_every_bundle_comes_in_order_wherever_it_lives(synthetic, kind, container, share):
    with flashfmt.open(synthetic(kind, container=container)) as model:
        n = len(model_blocks(model))
        assert n > 4
        source = ExactBundles(model, bundle_blocks.spread_evenly(n, int(n * share)), verify="always")
        source.load()
        passes(source, model, 3)
        streamed = source.counters.bytes_read
        passes(source, model, 1)
        assert (source.counters.bytes_read > streamed) == (share < 1)
        source.close()


def test_a_pass_that_was_broken_off_does_not_shift_the_next(synthetic):
    with flashfmt.open(synthetic()) as model:
        source = ExactBundles(model, [False] * len(model_blocks(model)))
        source.load()
        for _ in source.blocks(0):
            break
        passes(source, model, 2)
        source.close()


def load_and_pass(source, model):
    source.load()
    for layer in range(len(model.layers)):
        for _ in source.blocks(layer):
            pass


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_flipped_byte_names_layer_neuron_and_offset(synthetic, tmp_path, is_pinned):
    path = tmp_path / "flipped.flash"
    path.write_bytes(synthetic().read_bytes())
    with flashfmt.open(path) as model:
        info = model.layers[1]
        neuron = 123
        place = info.extent.offset + neuron * info.geometry.stride
        flip(path, place + 5)
        source = ExactBundles(model, [is_pinned] * len(model_blocks(model)), verify="first")
        with pytest.raises(ChecksumError, match="layer 1, neuron 123") as caught:
            load_and_pass(source, model)
        assert caught.value.where == place
        assert caught.value.exit_code == 3
        source.close()


def test_without_verification_a_flipped_byte_passes(synthetic, tmp_path):
    path = tmp_path / "flipped.flash"
    path.write_bytes(synthetic().read_bytes())
    with flashfmt.open(path) as model:
        flip(path, model.layers[0].extent.offset)
        source = ExactBundles(model, [False] * len(model_blocks(model)), verify="never")
        source.load()
        assert sum(len(block.rows) for block in source.blocks(0)) == model.layers[0].geometry.n_neurons
        source.close()


def test_a_file_that_shrinks_under_the_reader_is_a_read_error(synthetic, tmp_path):
    path = tmp_path / "shrinking.flash"
    path.write_bytes(synthetic().read_bytes())
    with flashfmt.open(path) as model:
        source = ExactBundles(model, [False] * len(model_blocks(model)), verify="never")
        os.truncate(path, model.layers[1].extent.offset)
        with pytest.raises(FlashReadError, match="ends inside"):
            load_and_pass(source, model)
        source.close()
