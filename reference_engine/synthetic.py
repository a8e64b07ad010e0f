"""Flash files with random weights in the shapes of real models: for measuring memory and speed without a download.

The weights are small random numbers, so activations stay finite; the text such a model writes means nothing. A
pool of random rows is written over and over, which makes a file as fast as the disk takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flashfmt import BundlesSpec, FlashWriter, TensorSpec
from flashfmt.encodings import Encoding, encode
from flashfmt.errors import FlashError
from flashfmt.manifest import (
    FORMAT_VERSION,
    Activation,
    Attention,
    Block,
    Decoder,
    Embedding,
    FeedForward,
    InputTap,
    Layer,
    LearnedPositions,
    Logits,
    Manifest,
    Norm,
    Predictor,
    Provenance,
    Rotary,
    bundle_checksums_name,
    required_arrays,
)

_POOL_ROWS: Final = 512
_BLOCK_NEURONS: Final = 512
_WEIGHT_SCALE: Final = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model, and the kind of decoder.

    `plain` is OPT's kind (ReLU, learned positions, biases), `parallel` Falcon's (ReLU, attention and FFN side by side,
    no biases), else it is Llama's (gated). `relu` puts a ReLU in the place of a gate's SiLU.
    """

    name: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    plain: bool
    tied: bool
    context_tokens: int = 2048
    parallel: bool = False
    relu: bool = False

    @property
    def is_sparse(self) -> bool:
        """Whether the activation gives exact zeros, so that neurons can be left out."""
        return self.plain or self.parallel or self.relu

    def decoder(self) -> Decoder:
        """Description of a decoder in these sizes."""
        if self.plain:
            return Decoder(
                vocab_size=self.vocab_size,
                d_model=self.d_model,
                context_tokens=self.context_tokens,
                embedding=Embedding(d_embed=self.d_model),
                positions=LearnedPositions(n_rows=self.context_tokens + 2, offset=2),
                norm=Norm(kind="layer_norm", eps=1e-5, bias=True),
                block=Block(order="pre_norm"),
                attention=self._attention(biases=True),
                ffn=FeedForward(
                    kind="plain", d_ff=self.d_ff, activation=Activation(kind="relu"), up_bias=True, down_bias=True
                ),
                logits=Logits(tied=self.tied),
                layers=(Layer(),) * self.n_layers,
            )
        relu = self.parallel or self.relu
        activation = Activation(kind="relu" if relu else "silu")
        return Decoder(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            context_tokens=self.context_tokens,
            embedding=Embedding(d_embed=self.d_model),
            rotary=(Rotary(name="main", n_dims=self.d_model // self.n_heads),),
            norm=Norm(kind="layer_norm", eps=1e-5, bias=True) if self.parallel else Norm(kind="rms_norm", eps=1e-5),
            block=Block(order="parallel", shared_norm=True) if self.parallel else Block(order="pre_norm"),
            attention=self._attention(biases=False),
            ffn=FeedForward(kind="plain" if self.parallel else "gated", d_ff=self.d_ff, activation=activation),
            logits=Logits(tied=self.tied),
            layers=(Layer(rotary="main"),) * self.n_layers,
        )

    def _attention(self, *, biases: bool) -> Attention:
        head_dim = self.d_model // self.n_heads
        return Attention(
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=biases,
            output_bias=biases,
        )


SHAPES: Final[dict[str, Shape]] = {
    shape.name: shape
    for shape in (
        Shape("opt-125m", 12, 768, 3072, 12, 12, 50272, plain=True, tied=True),
        Shape("opt-1.3b", 24, 2048, 8192, 32, 32, 50272, plain=True, tied=True),
        Shape("opt-2.7b", 32, 2560, 10240, 32, 32, 50272, plain=True, tied=True),
        Shape("opt-6.7b", 32, 4096, 16384, 32, 32, 50272, plain=True, tied=True),
        Shape("opt-13b", 40, 5120, 20480, 40, 40, 50272, plain=True, tied=True),
        Shape("opt-30b", 48, 7168, 28672, 56, 56, 50272, plain=True, tied=True),
        Shape("opt-66b", 64, 9216, 36864, 72, 72, 50272, plain=True, tied=True),
        Shape("falcon-7b", 32, 4544, 18176, 71, 1, 65024, plain=False, tied=True, parallel=True),
        Shape("llama-1.1b", 22, 2048, 5632, 32, 4, 32000, plain=False, tied=False),
        Shape("llama-2-7b", 32, 4096, 11008, 32, 32, 32000, plain=False, tied=False),
        Shape("relu-llama-2-7b", 32, 4096, 11008, 32, 32, 32000, plain=False, tied=False, relu=True),
        Shape("llama-3-8b", 32, 4096, 14336, 32, 8, 128256, plain=False, tied=False, context_tokens=8192),
        Shape("qwen2-0.5b", 24, 896, 4864, 14, 2, 151936, plain=False, tied=True),
    )
}


def write_synthetic(
    path: Path,
    shape: Shape,
    *,
    encoding: Encoding = Encoding.F16,
    residents: Encoding = Encoding.F16,
    predictor_ranks: Sequence[int] = (),
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a flash file of random weights. What an interrupted call has left is continued by the same call.

    Parameters
    ----------
    shape : sizes, such as one of `SHAPES`.
    encoding, residents : of the bundles and of the resident matrices.
    predictor_ranks : of a low-rank predictor for each layer; none without. They predict noise.
    progress : called with the bytes of each piece written.

    Raises
    ------
    FlashWriteError
    """
    manifest, tensors, bundles = _declaration(shape, encoding, residents, predictor_ranks)
    decoder = manifest.decoder
    rng = np.random.default_rng(seed)
    with _writer(path, manifest, tensors, bundles, seed) as writer:
        for spec in tensors:
            data = _tensor(spec, rng)
            writer.write_tensor(spec.name, data)
            if progress is not None:
                progress(data.nbytes)
        pool = _rows(rng, (_BLOCK_NEURONS, len(decoder.ffn.parts), decoder.d_model), encoding)
        for layer in range(decoder.n_layers):
            with writer.bundles(layer) as sink:
                for first in range(0, decoder.ffn.d_ff, _BLOCK_NEURONS):
                    block = pool[: min(_BLOCK_NEURONS, decoder.ffn.d_ff - first)]
                    sink.append(block)
                    if progress is not None:
                        progress(block.nbytes)


def synthetic_nbytes(
    shape: Shape,
    *,
    encoding: Encoding = Encoding.F16,
    residents: Encoding = Encoding.F16,
    predictor_ranks: Sequence[int] = (),
) -> int:
    """Bytes of weights that `write_synthetic` writes; the file is larger by less than a hundredth."""
    _, tensors, bundles = _declaration(shape, encoding, residents, predictor_ranks)
    return sum(spec.nbytes for spec in tensors) + sum(spec.geometry.payload_nbytes for spec in bundles)


def discard_synthetic(
    path: Path,
    shape: Shape,
    *,
    encoding: Encoding = Encoding.F16,
    residents: Encoding = Encoding.F16,
    predictor_ranks: Sequence[int] = (),
    seed: int = 0,
) -> None:
    """Remove what an interrupted `write_synthetic` with the same arguments has left; nothing where it left nothing."""
    manifest, tensors, bundles = _declaration(shape, encoding, residents, predictor_ranks)
    with suppress(FlashError):
        _writer(path, manifest, tensors, bundles, seed).discard()


def _declaration(
    shape: Shape, encoding: Encoding, residents: Encoding, predictor_ranks: Sequence[int]
) -> tuple[Manifest, list[TensorSpec], list[BundlesSpec]]:
    decoder = shape.decoder()
    manifest = Manifest(
        version=FORMAT_VERSION,
        metadata_crc32c="00000000",
        name=f"synthetic {shape.name}",
        decoder=decoder,
        provenance=Provenance(writer="reference_engine.synthetic", source=shape.name, source_format="synthetic"),
        predictors=tuple(
            Predictor(layer=layer, kind="low_rank", tap=InputTap(layer=layer), threshold=0.5, rank=rank)
            for layer, rank in enumerate(predictor_ranks)
        ),
    )
    bundles = [
        BundlesSpec(layer, encoding, decoder.ffn.parts, decoder.ffn.d_ff, decoder.d_model)
        for layer in range(decoder.n_layers)
    ]
    return manifest, list(_tensor_specs(manifest, residents)), bundles


def _writer(
    path: Path, manifest: Manifest, tensors: list[TensorSpec], bundles: list[BundlesSpec], seed: int
) -> FlashWriter:
    return FlashWriter(path, manifest, tensors=tensors, bundles=bundles, files=[], fingerprint=f"synthetic {seed}")


def _tensor_specs(manifest: Manifest, residents: Encoding) -> Iterator[TensorSpec]:
    checksums = {bundle_checksums_name(layer) for layer in range(manifest.decoder.n_layers)}
    for name, rule in required_arrays(manifest).items():
        if name not in checksums:
            plain = not rule.encodable or name == "embedding/positions"
            yield TensorSpec(name, Encoding.F32 if plain else residents, rule.shape)


def _tensor(spec: TensorSpec, rng: np.random.Generator) -> npt.NDArray[Any]:
    if spec.name.startswith("rotary/"):
        n = spec.shape[0]
        return (10000.0 ** (-np.arange(n) / n)).astype(np.float32)
    if len(spec.shape) == 1:
        constant = 1.0 if spec.name.endswith("norm/weight") else 0.0
        return np.full(spec.shape, constant, np.float32)
    pool = _rows(rng, (min(_POOL_ROWS, spec.shape[0]), spec.shape[1]), spec.encoding)
    return np.resize(pool, (spec.shape[0], pool.shape[1]))


def _rows(rng: np.random.Generator, shape: tuple[int, ...], encoding: Encoding) -> npt.NDArray[Any]:
    return encode(rng.standard_normal(shape, np.float32) * np.float32(_WEIGHT_SCALE), encoding)
