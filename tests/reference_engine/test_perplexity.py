"""Strided perplexity, against transformers and plain float64."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_engine.engine import EngineOptions
from reference_engine.observation import ObservedModel
from reference_engine.perplexity import Score, TextWindow, score_text, text_windows


@given(n_tokens=st.integers(2, 300), window=st.integers(2, 64), data=st.data())
def test_every_token_with_something_before_it_is_scored_once(n_tokens, window, data):
    stride = data.draw(st.integers(1, window))
    windows = text_windows(n_tokens, window=window, stride=stride)
    scored = [token for w in windows for token in range(w.scored_from, w.last)]
    firsts = set(range(0, n_tokens, window)) if stride == window else {0}
    assert scored == [token for token in range(n_tokens) if token not in firsts]
    assert all(w.first < w.scored_from and w.last - w.first <= window for w in windows)


def test_windows_of_the_guide():
    assert text_windows(10, window=4, stride=2) == [
        TextWindow(0, 4, 1),
        TextWindow(2, 6, 4),
        TextWindow(4, 8, 6),
        TextWindow(6, 10, 8),
    ]


@pytest.mark.parametrize(("window", "stride"), [(4, 5), (4, 0), (1, 1)])
def test_windows_that_skip_text_are_refused(window, stride):
    with pytest.raises(ValueError, match="does not fit"):
        text_windows(10, window=window, stride=stride)


class UniformModel:
    """Gives every token the same probability."""

    def hidden_states(self, token_ids):
        yield 0, np.zeros((len(token_ids), 1), np.float32)

    def logits(self, hidden):
        return np.full((len(hidden), 50), 3.0, np.float32)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    score = score_text(UniformModel(), range(20), text_windows(20, window=8, stride=4))
    assert score.n_tokens == 19
    assert score.perplexity == pytest.approx(50)


def test_a_perplexity_beyond_floats_is_infinite():
    assert Score(1e6, 1).perplexity == math.inf


def guide_perplexity(oracle, ids, window, stride):
    """The loop of https://huggingface.co/docs/transformers/perplexity; scored tokens are counted exactly."""
    torch = pytest.importorskip("torch")
    nats, n_scored, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        inputs = torch.tensor([ids[begin:end]])
        targets = inputs.clone()
        targets[:, : -(end - previous_end)] = -100
        n = int((targets[:, 1:] != -100).sum())
        if n:
            with torch.no_grad():
                nats += float(oracle(inputs, labels=targets).loss.double()) * n
            n_scored += n
        previous_end = end
        if end == len(ids):
            break
    return math.exp(nats / n_scored), n_scored


@pytest.mark.parametrize("variant", ["opt", "llama"])
@pytest.mark.parametrize(("window", "stride"), [(128, 64), (100, 33), (64, 64)])
def test_perplexity_is_that_of_transformers(tiny_checkpoint, tiny_flash, variant, window, stride):
    ids = np.random.default_rng(4).integers(3, 300, 400).tolist()
    expected, n_scored = guide_perplexity(tiny_checkpoint(variant)[1], ids, window, stride)
    with ObservedModel(tiny_flash(variant), EngineOptions(memory=4 << 30, backend="numpy")) as model:
        score = score_text(model.watched(None), ids, text_windows(400, window=window, stride=stride))
    assert score.n_tokens == n_scored
    assert score.perplexity == pytest.approx(expected, rel=1e-3)
