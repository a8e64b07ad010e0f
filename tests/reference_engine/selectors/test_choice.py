from pathlib import Path

import numpy as np
import pytest

import flashfmt
from flashfmt.encodings import Encoding
from flashfmt.errors import PromptError
from flashfmt.manifest import InputTap
from reference_engine.activity_trace import TraceHeader, TraceWriter
from reference_engine.backends import load_backend
from reference_engine.selectors import (
    Everything,
    LowBitGate,
    Oracle,
    SelectorChoice,
    Threshold,
    load_selectors,
    parse_selector,
    selectors_nbytes,
)

X = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("file", SelectorChoice("file")),
        ("all", SelectorChoice("all")),
        ("oracle", SelectorChoice("oracle")),
        ("oracle:0.01", SelectorChoice("oracle", 0.01)),
        ("threshold:0.1", SelectorChoice("threshold", 0.1)),
        ("threshold:0@attention_input", SelectorChoice("threshold", 0.0, tap="attention_input")),
        ("lowbit:q4", SelectorChoice("lowbit", None, Encoding.Q4)),
        ("lowbit:q8:0.2@previous", SelectorChoice("lowbit", 0.2, Encoding.Q8, tap="previous")),
        ("trace:a:b@c", SelectorChoice("trace", trace=Path("a:b@c"))),
    ],
)
def test_choices_as_text(text, choice):
    assert parse_selector(text) == choice


@pytest.mark.parametrize(
    "text",
    ["", "oracle:", "threshold", "threshold:x", "threshold:-1", "threshold:nan", "lowbit", "lowbit:q2", "lowbit:f16",
     "all:1", "trace", "trace:", "file:1", "all@previous", "oracle@", "oracle@next", "lowbit:q4:1:2"],
)  # fmt: skip
def test_texts_that_are_no_choice(text):
    with pytest.raises(ValueError):
        parse_selector(text)


@pytest.mark.parametrize(
    ("text", "kind", "n_parts"),
    [("all", Everything, 0), ("oracle", Oracle, 2), ("threshold:0.1", Threshold, 1), ("lowbit:q8:0.1", LowBitGate, 1)],
)
def test_every_layer_gets_its_selector(synthetic, text, kind, n_parts):
    with flashfmt.open(synthetic("gated", "q8")) as model:
        selectors = load_selectors(model, parse_selector(text), load_backend("numpy"))
        assert [type(s.selector) for s in selectors] == [kind] * 2
        assert [s.tap for s in selectors] == [InputTap(layer=0), InputTap(layer=1)]
        part = model.layers[0].part.nbytes * 320
        assert 0 <= selectors_nbytes(model, parse_selector(text)) - 2 * n_parts * part <= 2 * n_parts * 4096


@pytest.mark.parametrize(
    ("place", "taps"),
    [
        ("previous", [(0, "ffn_input"), (0, "ffn_input"), (1, "ffn_input")]),
        ("attention_output", [(layer, "attention_output") for layer in range(3)]),
    ],
)
def test_looking_ahead_names_an_earlier_activation(synthetic, place, taps):
    with flashfmt.open(synthetic()) as model:
        selectors = load_selectors(model, parse_selector(f"threshold:0@{place}"), load_backend("numpy"))
        assert [(s.tap.layer, s.tap.point) for s in selectors] == taps


def test_the_low_bit_gate_of_a_relu_cuts_where_the_relu_does(synthetic):
    with flashfmt.open(synthetic("plain", "f32")) as model:
        backend = load_backend("numpy")
        few_bits, exact = (
            load_selectors(model, parse_selector(text), backend)[0].selector.select(X)
            for text in ("lowbit:q8", "threshold:0")
        )
        assert len(np.setxor1d(few_bits, exact)) < 0.02 * len(exact)


def test_choices_that_do_not_go_with_the_model(synthetic, tmp_path):
    with flashfmt.open(synthetic("gated")) as model:
        with pytest.raises(PromptError, match="no predictors"):
            selectors_nbytes(model, parse_selector("file"))
        with pytest.raises(PromptError, match="say where to cut it"):
            selectors_nbytes(model, parse_selector("lowbit:q4"))
        TraceWriter(tmp_path / "t", TraceHeader("other", 2, 99)).close()
        with pytest.raises(PromptError, match="another shape"):
            selectors_nbytes(model, parse_selector(f"trace:{tmp_path / 't'}"))


def test_layers_replay_a_trace_each_at_its_own_pace(synthetic, tmp_path):
    recorded = [[np.array([i, 10 + layer], np.int32) for layer in range(3)] for i in range(3)]
    with TraceWriter(tmp_path / "t", TraceHeader("m", 3, 448)) as writer:
        for active in recorded:
            writer.write(1, [(ids, {}) for ids in active])
    with flashfmt.open(synthetic()) as model:
        selectors = load_selectors(model, parse_selector(f"trace:{tmp_path / 't'}"), load_backend("numpy"))
    seen = [0, 0, 0]
    for layer in (0, 0, 1, 2, 2, 1, 0, 1, 2):
        np.testing.assert_array_equal(selectors[layer].selector.select(X), recorded[seen[layer]][layer])
        seen[layer] += 1
    with pytest.raises(PromptError, match="no more tokens"):
        selectors[0].selector.select(X)
