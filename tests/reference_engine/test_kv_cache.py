import numpy as np
import pytest

from flashfmt.manifest import Activation, Attention, Decoder, Embedding, FeedForward, Layer, Logits, Norm
from reference_engine.kv_cache import KvCache, kv_cache_nbytes

DECODER = Decoder(
    vocab_size=10,
    d_model=8,
    context_tokens=64,
    embedding=Embedding(d_embed=8),
    norm=Norm(kind="rms_norm", eps=1e-5),
    attention=Attention(n_heads=4, n_kv_heads=2, head_dim=4, scale=0.5),
    ffn=FeedForward(kind="plain", d_ff=16, activation=Activation(kind="relu")),
    logits=Logits(tied=True),
    layers=(Layer(), Layer(), Layer()),
)


@pytest.mark.parametrize(("kv_type", "dtype"), [("f32", np.float32), ("f16", np.float16)])
def test_appended_tokens_are_found_by_layer_and_head(kv_type, dtype):
    cache = KvCache(DECODER, 16, kv_type)
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 3, 5, 2, 4)).astype(np.float32)  # each (n_layers, n_new, n_kv_heads, head_dim)
    for step in (slice(0, 2), slice(2, 5)):
        for layer in range(3):
            cache.append(layer, k[layer, step], v[layer, step])
        cache.advance(step.stop - step.start)
    assert cache.n_tokens == 5
    for layer in range(3):
        keys, values = cache.layer(layer)
        assert keys.dtype == dtype
        assert keys.flags.c_contiguous
        np.testing.assert_array_equal(keys[:, :5], k[layer].swapaxes(0, 1).astype(dtype))
        np.testing.assert_array_equal(values[:, :5], v[layer].swapaxes(0, 1).astype(dtype))


def test_bytes_are_those_allocated():
    assert kv_cache_nbytes(DECODER, 16, "f32") == sum(a.nbytes for a in KvCache(DECODER, 16).layer(0)) * 3
    assert kv_cache_nbytes(DECODER, 16, "f16") * 2 == kv_cache_nbytes(DECODER, 16, "f32")


def test_truncate_goes_back_but_not_forward():
    cache = KvCache(DECODER, 16)
    cache.advance(5)
    cache.truncate(2)
    assert cache.n_tokens == 2
    with pytest.raises(ValueError, match="cannot keep 3 of 2"):
        cache.truncate(3)
