import numpy as np
import pytest

from flashfmt.manifest import Activation
from reference_engine.backends.activations import activate
from reference_engine.observation import NONZERO, Cut
from reference_engine.value_cuts import ValueSample, natural_cut

SILU = Activation(kind="silu")


@pytest.fixture
def filled():
    """(sample, tested, h) of one layer of 200 neurons and 640 tokens."""
    rng = np.random.default_rng(0)
    tested = rng.normal(-0.5, 1, (640, 200)).astype(np.float32)
    h = activate(SILU, tested) * rng.standard_normal((640, 200)).astype(np.float32)
    sample = ValueSample(1, 200, SILU)
    for first in range(0, 640, 64):
        tokens = slice(first, first + 64)
        for neurons in (slice(0, 150), slice(150, 200)):
            sample.neurons(0, neurons, tested[tokens, neurons], h[tokens, neurons])
    return sample, tested, h


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_cut_leaves_the_share_asked_for(filled, share):
    sample, tested, h = filled
    for cut in (sample.cut(0, "h", share), sample.cut(0, "activated", share), sample.tested_cut(0, share)):
        assert cut.passes(tested, h, SILU).mean() == pytest.approx(share, abs=0.05)


def test_the_tested_cut_keeps_more_than_the_other_way(filled):
    sample, tested, h = filled
    cut = sample.tested_cut(0, 0.4)
    values = tested if cut.magnitude else np.abs(tested)
    other = values > np.quantile(values, 0.6)
    kept = (h.astype(np.float64) ** 2)[cut.passes(tested, h, SILU)].sum()
    assert kept > (h.astype(np.float64) ** 2)[other].sum()


def test_all_is_all(filled):
    sample, tested, h = filled
    assert sample.tested_cut(0, 1.0).passes(tested, h, SILU).all()
    assert sample.cut(0, "h", 1.0) == NONZERO


def test_an_empty_sample_is_refused():
    with pytest.raises(ValueError, match="nothing was sampled"):
        ValueSample(1, 8, SILU).cut(0, "h", 0.5)


def test_activations_that_give_zeros_have_a_cut_of_their_own():
    assert natural_cut(SILU) is None
    assert natural_cut(Activation(kind="relu")) == Cut("tested", 0.0, magnitude=False)
    assert natural_cut(Activation(kind="fatrelu", threshold=0.3)) == Cut("tested", 0.3, magnitude=False)
