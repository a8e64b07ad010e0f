import numpy as np
import pytest

from flashfmt.errors import BudgetError, PromptError
from reference_engine import bundle_blocks, engine
from reference_engine.engine import Engine, EngineOptions

PROMPT = [5, 17, 3, 96, 0, 42, 8]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(bundle_blocks, "BLOCK_BYTES", 64 << 10)


def with_share(monkeypatch, share):
    """Make the planner pin a share of the blocks, whatever the ceiling."""
    plan_memory = engine.plan_memory

    def plan(fixed, blocks, ceiling, context_tokens):
        plan = plan_memory(fixed, blocks, 8 << 30, context_tokens)
        pinned = bundle_blocks.spread_evenly(len(blocks), int(len(blocks) * share))
        return engine.MemoryPlan(
            **{name: getattr(plan, name) for name in plan.__dataclass_fields__ if name != "pinned_blocks"},
            pinned_blocks=tuple(pinned),
        )

    monkeypatch.setattr(engine, "plan_memory", plan)


def logits(path, backend, prompt=PROMPT, **options):
    with Engine(path, EngineOptions(memory=8 << 30, backend=backend, **options)) as loaded:
        loaded.load()
        return loaded.start().feed_all(prompt)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("encoding", ["f32", "f16", "bf16", "q8", "q4"])
@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_output_is_the_same_bits_at_every_budget(synthetic, monkeypatch, kind, encoding, backend):
    path = synthetic(kind, encoding, encoding)
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, 97, 140).tolist()
    everything = logits(path, backend, prompt)
    for share in (0.0, 0.3, 0.9):
        with_share(monkeypatch, share)
        np.testing.assert_array_equal(logits(path, backend, prompt), everything)


@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("encoding", ["f32", "q8", "q4"])
def test_backends_agree(synthetic, kind, encoding):
    path = synthetic(kind, encoding, encoding)
    a, b = (logits(path, backend) for backend in ("numpy", "numba"))
    assert np.abs(a - b).max() <= 1e-4 * np.abs(a).max()


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_token_by_token_equals_all_at_once(synthetic, kind):
    path = synthetic(kind, "f32", "f32")
    whole = logits(path, "numba")
    with Engine(path, EngineOptions(memory=8 << 30)) as loaded:
        loaded.load()
        session = loaded.start()
        single = np.stack([session.feed([token]) for token in PROMPT])
        assert session.n_tokens == len(PROMPT)
        session.truncate(3)
        again = session.feed(PROMPT[3:])
    np.testing.assert_allclose(single, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    np.testing.assert_allclose(again, whole[-1], rtol=0, atol=1e-5 * np.abs(whole).max())


def test_half_precision_keys_and_values_change_little(synthetic):
    path = synthetic("gated", "f32", "f32")
    a, b = logits(path, "numba"), logits(path, "numba", kv_type="f16")
    assert 0 < np.abs(a - b).max() < 5e-3 * np.abs(a).max()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no tokens"),
        ([97], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        ([0] * 33, "33 tokens do not fit"),
    ],
)
def test_tokens_that_cannot_be_fed(synthetic, tokens, message):
    with Engine(synthetic(), EngineOptions(memory=8 << 30, context_tokens=32)) as loaded:
        loaded.load()
        with pytest.raises(PromptError, match=message):
            loaded.start().feed(tokens)


def test_a_budget_below_the_floor_is_refused_before_anything_is_loaded(synthetic, monkeypatch):
    monkeypatch.setattr(engine, "load_residents", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(BudgetError, match="smallest that works"):
        Engine(synthetic(), EngineOptions(memory=1 << 20))


@pytest.mark.parametrize("context_tokens", [0, 513])
def test_contexts_the_model_does_not_have(synthetic, context_tokens):
    with pytest.raises(PromptError, match="no such context"):
        Engine(synthetic(), EngineOptions(context_tokens=context_tokens))


def test_an_engine_runs_one_sequence_at_a_time(synthetic):
    with Engine(synthetic(), EngineOptions(memory=8 << 30)) as loaded:
        with pytest.raises(RuntimeError, match="not loaded"):
            loaded.start()
        loaded.load()
        first = loaded.start()
        first.feed(PROMPT)
        second = loaded.start()
        assert second.n_tokens == 0
        with pytest.raises(RuntimeError, match="another sequence"):
            first.feed(PROMPT)


def test_loading_reports_the_bytes_it_announced(synthetic):
    with Engine(synthetic(), EngineOptions(memory=8 << 30)) as loaded:
        seen = []
        loaded.load(seen.append)
        assert abs(sum(seen) - loaded.load_nbytes) <= 4096 * len(seen)


def test_reading_embedding_rows_is_counted(synthetic):
    with Engine(synthetic("gated"), EngineOptions(memory=8 << 30)) as loaded:
        loaded.load()
        assert loaded.plan.is_resident
        before = loaded.counters()
        loaded.start().feed(PROMPT)
        cost = loaded.counters() - before
        assert cost.n_requests == len(set(PROMPT))
        assert cost.bytes_read > 0
