import numpy as np
import pytest

from flashfmt.errors import FlashWriteError
from reference_engine.calibration.scratch import Scratch, Section

SIZES = {"n_layers": 2, "n_tokens": 10, "d_model": 4, "d_ff": 11, "chunk_tokens": 4}


@pytest.fixture
def recorded(tmp_path):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2, 10, 4)).astype(np.float32)
    active = rng.random((2, 10, 11)) < 0.4
    scratch = Scratch(tmp_path / "s", "a", **SIZES)
    for layer in range(2):
        for first in (0, 4, 8):
            tokens = slice(first, first + 4)
            scratch.write(layer, first, inputs=inputs[layer, tokens], active=active[layer, tokens])
    return scratch, inputs, active


def test_what_is_written_is_read_back(recorded):
    scratch, inputs, active = recorded
    np.testing.assert_allclose(scratch.inputs(1, 3, 9), inputs[1, 3:9], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(scratch.active(0, 3, 9), active[0, 3:9])


def test_a_section_pairs_inputs_of_one_layer_with_activity_of_another(recorded):
    scratch, inputs, active = recorded
    section = Section(scratch, layer=1, tap_layer=0, ranges=((1, 7), (8, 10)))
    assert (section.n_tokens, section.n_pieces) == (8, 3)
    pieces = [section.piece(index) for index in range(3)]
    tokens = [1, 2, 3, 4, 5, 6, 8, 9]
    np.testing.assert_allclose(np.concatenate([p[0] for p in pieces]), inputs[0, tokens], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(np.concatenate([p[1] for p in pieces]), active[1, tokens])


def test_a_section_held_in_memory_has_the_same_pieces(recorded):
    section = Section(recorded[0], layer=1, tap_layer=0, ranges=((1, 7), (8, 10)))
    held = section.in_memory()
    assert held is not section
    assert held.n_pieces == section.n_pieces
    for index in range(held.n_pieces):
        for stored, read in zip(held.piece(index), section.piece(index), strict=True):
            np.testing.assert_array_equal(stored, read)
    assert section.in_memory(limit=8 * (2 * 4 + 2)) is not section
    assert section.in_memory(limit=8 * (2 * 4 + 2) - 1) is section


def test_sums_of_chunks_add_up(tmp_path):
    scratch = Scratch(tmp_path / "s", "a", **SIZES)
    for first in (0, 4, 8):
        scratch.write(1, first, sizes=np.arange(11, dtype=np.float32) + first)
    np.testing.assert_array_equal(scratch.sizes(1, 4, 10), 2 * np.arange(11) + 12)
    section = Section(scratch, layer=1, tap_layer=0, ranges=((0, 4), (8, 10)))
    np.testing.assert_array_equal(section.sizes(), 2 * np.arange(11) + 8)


def test_values_beyond_float16_are_clipped(tmp_path):
    scratch = Scratch(tmp_path / "s", "a", **SIZES)
    scratch.write(0, 0, inputs=np.full((4, 4), 1e9, np.float32))
    assert scratch.inputs(0, 0, 4).max() == 65504


def test_the_same_calibration_goes_on_and_another_starts_anew(recorded):
    scratch, inputs, _ = recorded
    scratch.save_arrays("fit", {"up": inputs[0]})
    scratch.finish("step", {"n": 3})
    again = Scratch(scratch.path, "a", **SIZES)
    assert again.resumed
    assert again.done("step") == {"n": 3}
    np.testing.assert_array_equal(again.load_arrays("fit")["up"], inputs[0])
    np.testing.assert_allclose(again.inputs(0, 0, 10), inputs[0], rtol=1e-3, atol=1e-4)
    other = Scratch(scratch.path, "b", **SIZES)
    assert not other.resumed
    assert other.done("step") is None
    assert not other.inputs(0, 0, 10).any()


def test_a_damaged_journal_starts_anew(recorded):
    scratch, _, _ = recorded
    (scratch.path / "journal.json").write_text("{")
    assert not Scratch(scratch.path, "a", **SIZES).resumed


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FlashWriteError, match="move it away"):
        Scratch(tmp_path, "a", **SIZES)
    assert (tmp_path / "thesis.txt").exists()
