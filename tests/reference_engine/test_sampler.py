from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfmt.errors import FlashError, PromptError
from reference_engine.sampler import Sampler, SamplingOptions, kept_ids

NO_FILTER = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def random_logits(n, seed=0, scale=3.0):
    return (np.random.default_rng(seed).normal(size=n) * scale).astype(np.float32)


def probabilities(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def plainly_kept(logits, *, top_k, top_p, min_p, min_keep):
    """The filters one after the other on a sorted list, as their definitions read."""
    n_keep = max(min_keep, 1)
    ids = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k > 0:
        ids = ids[:top_k]
    if top_p < 1:
        total, kept = 0.0, []
        for i, p in zip(ids, probabilities(logits[ids]), strict=True):
            kept.append(i)
            total += p
            if total >= top_p and len(kept) >= n_keep:
                break
        ids = kept
    if min_p > 0:
        least = max(logits[ids]) + np.log(min_p)
        ids = [i for place, i in enumerate(ids) if logits[i] >= least or place < n_keep]
    return ids


def test_defaults_are_those_of_llama_cpp():
    o = SamplingOptions()
    assert (o.temperature, o.top_k, o.top_p, o.min_p, o.min_keep) == (0.8, 40, 0.95, 0.05, 0)
    assert (o.repeat_penalty, o.repeat_last_n, o.presence_penalty, o.frequency_penalty) == (1.0, 64, 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", float("nan"), "-100.0 to 100.0"),
        ("temperature", float("inf"), "-100.0 to 100.0"),
        ("top_p", 1.5, "0.0 to 1.0"),
        ("top_p", -0.1, "0.0 to 1.0"),
        ("min_p", 2, "0.0 to 1.0"),
        ("min_keep", -1, "at least 0"),
        ("repeat_penalty", 0.0, "0.01 to 100.0"),
        ("repeat_last_n", -2, "at least -1"),
        ("presence_penalty", float("nan"), "-100.0 to 100.0"),
        ("frequency_penalty", 101, "-100.0 to 100.0"),
        ("seed", -1, "0 to 18446744073709551615"),
    ],
)
def test_options_out_of_range_are_refused(name, value, expected):
    with pytest.raises(PromptError, match=name) as caught:
        SamplingOptions(**{name: value})
    assert caught.value.expected == expected
    assert caught.value.actual is value


@settings(max_examples=150, deadline=None)
@given(
    levels=st.lists(st.integers(-8, 8), min_size=1, max_size=30),
    top_k=st.integers(-1, 35),
    top_p=st.sampled_from([0.0, 0.25, 0.6, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 0.7, 1.0]),
    min_keep=st.integers(0, 6),
)
def test_kept_ids_follow_the_definitions(levels, top_k, top_p, min_p, min_keep):
    logits = (np.array(levels, np.float32) * 0.37).astype(np.float32)  # few levels: many ties
    options = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "min_keep": min_keep}
    got = kept_ids(logits, SamplingOptions(**options)).tolist()
    assert sorted(got) == sorted(plainly_kept(logits, **options))
    if top_k > 0 or top_p < 1:
        assert got == sorted(got, key=lambda i: (-logits[i], i))


@pytest.mark.parametrize("scale", [0.01, 0.3, 4.0])  # from nearly all of the vocabulary to a handful
@pytest.mark.parametrize("min_keep", [0, 300, 10_000])
def test_nucleus_of_a_large_vocabulary(scale, min_keep):
    logits = random_logits(20_000, scale=scale)
    options = {"top_k": 0, "top_p": 0.9, "min_p": 0.0, "min_keep": min_keep}
    assert kept_ids(logits, SamplingOptions(**options)).tolist() == plainly_kept(logits, **options)


@pytest.mark.parametrize("seed", range(4))
def test_filters_agree_with_transformers(seed):
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(500, seed)
    cases = [
        ({"top_k": 17}, warpers.TopKLogitsWarper(17)),
        ({"top_p": 0.8}, warpers.TopPLogitsWarper(0.8)),
        ({"top_p": 0.8, "min_keep": 90}, warpers.TopPLogitsWarper(0.8, min_tokens_to_keep=90)),
        ({"min_p": 0.1}, warpers.MinPLogitsWarper(0.1)),
        ({"min_p": 0.1, "min_keep": 50}, warpers.MinPLogitsWarper(0.1, min_tokens_to_keep=50)),
    ]
    for options, warper in cases:
        scores = warper(None, torch.from_numpy(logits)[None])[0]
        expected = torch.isfinite(scores).nonzero().flatten().tolist()
        assert sorted(kept_ids(logits, SamplingOptions(**(NO_FILTER | options)))) == expected


@settings(max_examples=60, deadline=None)
@given(
    history=st.lists(st.integers(0, 11), max_size=40),
    last_n=st.sampled_from([-1, 0, 1, 5, 64]),
    repeat=st.sampled_from([0.7, 1.0, 1.3]),
    presence=st.sampled_from([0.0, 0.4]),
    frequency=st.sampled_from([0.0, 0.25]),
    seed=st.integers(0, 5),
)
def test_greedy_takes_the_largest_penalised_logit(history, last_n, repeat, presence, frequency, seed):
    logits = random_logits(12, seed, scale=1.0)
    window = Counter(history if last_n < 0 else history[len(history) - min(last_n, len(history)) :])
    expected = logits.astype(np.float64)
    for token, count in window.items():
        expected[token] *= repeat if expected[token] <= 0 else 1 / repeat
        expected[token] -= count * frequency + presence
    options = SamplingOptions(
        temperature=0,
        repeat_last_n=last_n,
        repeat_penalty=repeat,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    sampler = Sampler(options, 12)
    for token in history:
        sampler.accept(token)
    assert sampler.sample(logits) == int(np.argmax(expected))


@pytest.mark.parametrize(("n_seen", "chosen"), [(2, 0), (3, 1)])
def test_the_frequency_penalty_counts_each_occurrence(n_seen, chosen):
    sampler = Sampler(SamplingOptions(temperature=0, frequency_penalty=0.15), 2)
    for _ in range(n_seen):
        sampler.accept(0)
    assert sampler.sample(np.array([1.0, 0.6], np.float32)) == chosen


def test_repetition_penalty_agrees_with_transformers():
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, history = random_logits(50, seed=3), [4, 7, 7, 31, 4, 49]
    penalised = processors.RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([history]), torch.from_numpy(logits.copy())[None]
    )[0].numpy()
    sampler = Sampler(SamplingOptions(temperature=1, repeat_penalty=1.7, seed=1, **NO_FILTER), 50)
    plain = Sampler(SamplingOptions(temperature=1, seed=1, **NO_FILTER), 50)
    for token in history:
        sampler.accept(token)
    assert [sampler.sample(logits) for _ in range(200)] == [plain.sample(penalised) for _ in range(200)]


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = np.array([1, 5, 5, 2, 5], np.float32)
    for temperature in (0, -1):
        assert Sampler(SamplingOptions(temperature=temperature), 5).sample(logits) == 1


def test_equal_logits_at_the_edge_of_top_k_are_kept_by_id():
    logits = np.array([0, 3, 1, 1, 3, 1, 1], np.float32)
    assert kept_ids(logits, SamplingOptions(**(NO_FILTER | {"top_k": 4}))).tolist() == [1, 4, 2, 3]


def test_a_seed_makes_the_choices_repeatable():
    logits = random_logits(1000)

    def draw(seed):
        sampler = Sampler(SamplingOptions(seed=seed, temperature=2.0), 1000)
        return [sampler.sample(logits) for _ in range(50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("filters", [NO_FILTER, {"top_k": 3, "top_p": 1.0, "min_p": 0.0}])
def test_tokens_come_as_often_as_they_should(filters):
    logits = np.array([0.3, 1.5, -0.2, 2.0, 0.9], np.float32)
    options = SamplingOptions(temperature=1.4, seed=11, **filters)
    sampler = Sampler(options, 5)
    n = 20_000
    counts = np.bincount([sampler.sample(logits) for _ in range(n)], minlength=5)
    kept = kept_ids(logits, options)
    expected = np.zeros(5)
    expected[kept] = probabilities(logits[kept] / 1.4)
    spread = np.sqrt(n * expected * (1 - expected))
    assert (np.abs(counts - n * expected) <= 4 * spread + 1e-9).all()


def test_temperature_comes_after_the_filters():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for temperature in (0.1, 1.0, 50.0):
        sampler = Sampler(SamplingOptions(temperature=temperature, top_p=0.7, min_p=0.0, seed=0), 4)
        assert {sampler.sample(logits) for _ in range(300)} <= {0, 1}


def test_a_tiny_temperature_is_greedy():
    sampler = Sampler(SamplingOptions(temperature=1e-300, seed=0, **NO_FILTER), 4)
    assert {sampler.sample(np.array([1, 3, 2.9, -5], np.float32)) for _ in range(20)} == {1}


def test_tokens_ruled_out_are_never_drawn():
    logits = np.full(6, -np.inf, np.float32)
    logits[[2, 4]] = 0
    for filters in (NO_FILTER, {}):
        sampler = Sampler(SamplingOptions(seed=0, **filters), 6)
        assert {sampler.sample(logits) for _ in range(100)} == {2, 4}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3])
def test_logits_that_are_no_numbers_are_an_error(temperature, bad):
    sampler = Sampler(SamplingOptions(temperature=temperature), 3)
    with pytest.raises(FlashError, match="logits"):
        sampler.sample(np.array(bad, np.float32))


def test_logits_that_a_penalty_makes_infinite_are_an_error():
    sampler = Sampler(SamplingOptions(repeat_penalty=0.01), 2)
    sampler.accept(0)
    with pytest.raises(FlashError, match="logits"):
        sampler.sample(np.array([3e38, 0], np.float32))


def test_logits_of_another_length_are_a_bug():
    with pytest.raises(ValueError, match="shape"):
        Sampler(SamplingOptions(), 3).sample(np.zeros(4, np.float32))


def test_the_logits_are_left_alone():
    logits = random_logits(100)
    before = logits.copy()
    sampler = Sampler(SamplingOptions(repeat_penalty=1.5, frequency_penalty=1.0), 100)
    for _ in range(5):
        sampler.accept(sampler.sample(logits))
    np.testing.assert_array_equal(logits, before)
