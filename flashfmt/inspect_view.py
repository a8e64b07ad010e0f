"""What `flashfmt inspect` shows on a terminal: a model in figures, its decoder in words, its arrays as a tree.

Knows: an open model and rich. Does not know: options, files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from flashfmt.inspection import ArraySummary, n_parameters, sizes, summaries
from flashfmt.manifest import Activation, Decoder, Norm, Predictor
from flashfmt.progress import format_bytes
from flashfmt.reader import FlashModel

_LAYERS: Final = "layers"
_NORM_NAMES: Final = {"layer_norm": "layer norm", "rms_norm": "RMS norm"}


def describe(decoder: Decoder) -> list[str]:
    """The decoder in plain words, a few sentences."""
    d, a, f = decoder, decoder.attention, decoder.ffn
    windows = sorted({layer.attention_window_tokens for layer in d.layers if layer.attention_window_tokens})
    order = {
        "pre_norm": "norm before each step",
        "post_norm": "norm after each step",
        "parallel": "attention and FFN in parallel",
    }
    heads = f"{a.n_heads} heads of {a.head_dim}"
    heads += f" sharing {a.n_kv_heads} key/value heads" if a.n_kv_heads != a.n_heads else ""
    gate = (
        f"{_activation(f.activation)}(gate) x {_with_identity(f.up_activation)}"
        if f.kind == "gated"
        else _activation(f.activation)
    )
    positions = []
    if d.positions is not None:
        positions.append(f"learned, {d.positions.n_rows} rows")
    positions += [f"rotary over {table.n_dims} dimensions ({table.pairing})" for table in d.rotary]
    return [
        f"{d.n_layers} layers of width {d.d_model}, {order[d.block.order]}",
        f"{d.vocab_size} tokens, context of {d.context_tokens}",
        f"attention: {heads}" + (f", windows of {', '.join(map(str, windows))} tokens" if windows else ""),
        f"positions: {' and '.join(positions) or 'none'}",
        f"FFN: {f.kind}, {f.d_ff} neurons, {gate}",
        f"norm: {_norm(d.norm)}; output matrix {'tied to the embedding' if d.logits.tied else 'of its own'}",
    ]


def _activation(activation: Activation) -> str:
    return f"{activation.kind} above {activation.threshold:g}" if activation.kind == "fatrelu" else activation.kind


def _with_identity(activation: Activation) -> str:
    return "up" if activation.kind == "identity" else f"{_activation(activation)}(up)"


def _norm(norm: Norm) -> str:
    return f"{_NORM_NAMES[norm.kind]}, eps {norm.eps:g}" + (", with bias" if norm.bias else "")


def view(model: FlashModel, *, all_arrays: bool, layer: int | None) -> RenderableType:
    """Header and tree for a terminal.

    Parameters
    ----------
    all_arrays : show every layer; otherwise layers that are alike are shown once.
    layer : show this layer alone; must exist.
    """
    arrays = summaries(model)
    tree = Tree(Text("arrays", style="bold"))
    if layer is None:
        _add_nodes(tree, _nested({a.name: _line(a, True) for a in arrays if not a.name.startswith(_LAYERS + "/")}))
    groups = [[layer]] if layer is not None else list(_groups(model, arrays, all_arrays))
    for group in groups:
        prefix = f"{_LAYERS}/{group[0]}/"
        inside = {a.name.removeprefix(prefix): _line(a, len(group) == 1) for a in arrays if a.name.startswith(prefix)}
        alike = f"{_LAYERS}/{group[0]}..{group[-1]}  ({len(group)} alike)" if len(group) > 1 else prefix[:-1]
        _add_nodes(tree.add(Text(alike, style="bold")), _nested(inside))
    return Group(*_header(model), *_extras(model, layer), tree)


def _header(model: FlashModel) -> Iterator[Text]:
    manifest = model.manifest
    yield Text(f"{manifest.name or model.path.name}", style="bold")
    source = manifest.provenance
    yield Text(f"format {manifest.version}, {source.architecture or 'unnamed architecture'}, from {source.source}")
    yield Text(f"{n_parameters(model) / 1e6:,.1f} M parameters, {format_bytes(model.nbytes)} in one {model.container}")
    for role, nbytes in sizes(model).items():
        yield Text(f"  {role:<11}{format_bytes(nbytes):>11}  {100 * nbytes / model.nbytes:5.1f} %")
    for sentence in describe(model.decoder):
        yield Text(sentence)


def _extras(model: FlashModel, layer: int | None) -> Iterator[Text]:
    predictors = [p for p in model.manifest.predictors if layer in (None, p.layer)]
    for predictor in predictors:
        yield Text(f"predictor of layer {predictor.layer}: {_predictor(predictor)}")
    statistics = model.manifest.statistics
    if statistics is not None:
        yield Text(
            f"statistics: {statistics.n_tokens} tokens of {statistics.text}, windows to {statistics.window_tokens}"
        )


def _predictor(p: Predictor) -> str:
    kind = f"low rank {p.rank}" if p.kind == "low_rank" else "low-bit gate"
    tap = f"{p.tap.point} of layer {p.tap.layer}"
    if p.measured is None:
        return f"{kind}, reads {tap}, threshold {p.threshold:g}, not measured"
    m = p.measured
    cost = "" if m.perplexity_ratio is None else f", perplexity of the model {100 * (m.perplexity_ratio - 1):+.2f} %"
    return (
        f"{kind}, reads {tap}, threshold {p.threshold:g}: recall {m.recall:.3f}, precision {m.precision:.3f}, "
        f"{100 * m.predicted_fraction:.1f} % predicted{cost}, on {m.n_tokens} tokens of {m.text}"
    )


def _groups(model: FlashModel, arrays: list[ArraySummary], all_arrays: bool) -> Iterator[list[int]]:
    """Runs of layers whose arrays have the same names, forms and sizes."""
    forms: dict[int, list[tuple[object, ...]]] = {layer: [] for layer in range(model.decoder.n_layers)}
    for array in arrays:
        segments = array.name.split("/", 2)
        if segments[0] == _LAYERS:
            form = (segments[2], array.kind, array.encoding, array.shape, array.codec)
            forms[int(segments[1])].append(form)
    for _, run in groupby(forms, key=lambda layer: layer if all_arrays else sorted(map(repr, forms[layer]))):
        yield list(run)


def _line(array: ArraySummary, with_offset: bool) -> str:
    shape = " x ".join(map(str, array.shape))
    codec = f" {array.codec}" if array.codec != "raw" else ""
    place = f"  at {array.offset:,}" if with_offset else ""
    return f"{shape}  {array.encoding}{codec}  {format_bytes(array.nbytes)}{place}"


Nested = dict[str, "Nested | str"]


def _nested(lines: Mapping[str, str]) -> Nested:
    """Lines by name, as dictionaries in dictionaries."""
    root: Nested = {}
    for name, line in lines.items():
        *groups, leaf = name.split("/")
        node = root
        for group in groups:
            child = node.setdefault(group, {})
            if isinstance(child, str):
                raise ValueError(f"{name} lies below an array")
            node = child
        node[leaf] = line
    return root


def _add_nodes(tree: Tree, nodes: Nested) -> None:
    for name, node in nodes.items():
        if isinstance(node, str):
            tree.add(Text.assemble((name, "cyan"), "  ", node))
        else:
            _add_nodes(tree.add(Text(name)), node)
