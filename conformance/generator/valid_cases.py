"""Cases that a reader must accept, with its exact answers.

Knows: which questions are asked of which model. Does not know: how answers are compared.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np

from generator.cases import Case
from generator.model import Model, little_endian, random_inputs

Json = dict[str, Any]

RTOL = 1e-4
MARGIN = 2e-3
TOKENS = [3, 1, 7, 7, 0, 5, 2]


def model_cases(model: Model, path: str) -> Iterator[Case]:
    """All cases about one model."""
    name, d = model.recipe.name, model.decoder
    container = [model.recipe.container]
    encodings = sorted({model.hierarchy.attributes(array)["encoding"] for array in _arrays(model)})
    codecs = sorted({model.codecs.get(array, "raw") for array in model.tensor_names()})
    needs = {"containers": container, "encodings": encodings, "codecs": codecs}
    last = d["ffn"]["d_ff"] - 1
    chosen = [[layer, neuron] for layer in range(len(d["layers"])) for neuron in (0, last // 2, last)]

    def case(level: str, request: Json, expected: Json, **rest: Any) -> Case:
        request = {"level": level, "path": path, **request}
        return Case(f"valid/{name}.{level}", level, request, expected, needs=needs, **rest)

    structure = case("structure", {"bundles": chosen}, model.structure(chosen))
    structure.needs = {"containers": container}
    yield structure
    tensors = model.tensor_names()
    yield case("values", {"tensors": tensors, "bundles": chosen}, model.values(tensors, chosen))
    yield case("integrity", {}, {"verified": True})
    if not name.startswith(("every-encoding", "alignment")):
        logits = _encoded(model.logits(TOKENS))
        yield case("decode", {"tokens": TOKENS}, {"logits": logits}, approximate={"logits": RTOL})
    for predictor in model.manifest["predictors"]:
        yield _selection(model, predictor, path, container)


def _selection(model: Model, predictor: Json, path: str, container: list[str]) -> Case:
    layer, threshold = predictor["layer"], predictor["threshold"]
    n_tokens, accepted, seed = 4, [], 0
    while len(accepted) < n_tokens:  # inputs whose scores all keep clear of the threshold
        x = random_inputs(f"{model.recipe.name} {layer} {seed}", 1, model.decoder["d_model"])
        seed += 1
        if np.abs(model.scores(layer, x) - threshold).min() > MARGIN:
            accepted.append(x)
    inputs = np.concatenate(accepted)
    scores = model.scores(layer, inputs)
    active = [np.flatnonzero(row > threshold).tolist() for row in scores]
    if not any(active) or all(len(ids) == scores.shape[1] for ids in active):
        raise ValueError(f"the predictor of layer {layer} selects all or nothing")
    prefix = f"layers/{layer}/predictor"
    used = [name for name in model.tensor_names() if name.startswith(prefix)]
    needs = {"containers": container, "encodings": sorted({model.hierarchy.attributes(n)["encoding"] for n in used})}
    request = {"level": "selection", "path": path, "layer": layer, "inputs": _encoded(inputs), "n_tokens": n_tokens}
    expected = {"active": active, "scores": _encoded(scores.astype(np.float32))}
    name = f"valid/{model.recipe.name}.selection-layer-{layer}"
    return Case(name, "selection", request, expected, needs=needs, approximate={"scores": RTOL})


def _arrays(model: Model) -> list[str]:
    return model.tensor_names() + model.bundle_names()


def _encoded(array: Any) -> str:
    return base64.b64encode(little_endian(array)).decode()


def window_cases() -> Iterator[Case]:
    """Traces of active sets and what a DRAM window loads and evicts; no model is involved."""
    trace = [[0, 1, 2], [2, 3], [3], [0, 7], [], [1, 2, 3, 7], [7], [7], [], [0]]
    wide = [sorted({(7 * t * t + 13 * i) % 64 for i in range(9 + t % 5)}) for t in range(40)]
    for name, rule, steps, n in [
        ("recent-1", {"k": 1}, trace, 8),
        ("recent-2", {"k": 2}, trace, 8),
        ("recent-5", {"k": 5}, trace, 8),
        ("recent-20", {"k": 20}, trace, 8),
        ("recent-4-of-64", {"k": 4}, wide, 64),
        ("recent-3-capacity-4", {"k": 3, "capacity": 4}, trace, 8),
        ("recent-4-capacity-24-of-64", {"k": 4, "capacity": 24}, wide, 64),
        ("recent-1000-capacity-16-of-64", {"k": 1000, "capacity": 16}, wide, 64),
        ("capacity-4", {"capacity": 4}, trace, 8),
        ("capacity-5", {"capacity": 5}, trace, 8),
        ("capacity-8", {"capacity": 8}, trace, 8),
        ("capacity-16-of-64", {"capacity": 16}, wide, 64),
    ]:
        request = {"level": "window", "n_neurons": n, "trace": steps, **rule}
        loaded, evicted = window(steps, rule.get("k", len(steps)), rule.get("capacity", n))
        yield Case(f"valid/{name}.window", "window", request, {"loaded": loaded, "evicted": evicted})


def window(trace: list[list[int]], k: int, capacity: int) -> tuple[list[list[int]], list[list[int]]]:
    """Hold what the last k tokens used; of that, where it outgrows `capacity`, drop the least recently active."""
    loaded, evicted = [], []
    held: dict[int, int] = {}  # neuron -> the token that used it last
    for t, active in enumerate(trace):
        before = set(held)
        held |= dict.fromkeys(active, t)
        held = {neuron: last for neuron, last in held.items() if last > t - k}
        by_age = sorted(held, key=lambda neuron: (held[neuron], neuron))
        for neuron in by_age[: max(0, len(held) - capacity)]:
            del held[neuron]
        loaded.append(sorted(set(active) - before))
        evicted.append(sorted(before - set(held)))
    return loaded, evicted
