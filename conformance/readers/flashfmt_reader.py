"""The project's own library and engine as a reader under test: every level.

Reads one request from standard input and answers as README.md says. Knows: the protocol, public names of the packages.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import sys
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]

EXIT_REJECT = 65


def main() -> int:
    """Answer one request."""
    from flashfmt.errors import FlashError

    request = json.load(sys.stdin)
    try:
        answer = ANSWERS[request["level"]](request)
    except FlashError as error:
        if error.rule is None:
            raise
        _write({"rule": error.rule})
        return EXIT_REJECT
    _write(answer)
    return 0


def _write(answer: Json) -> None:
    print(json.dumps(answer, separators=(",", ":"), sort_keys=True, ensure_ascii=True, allow_nan=False))


def capabilities(request: Json) -> Json:
    """Everything."""
    return {
        "codecs": ["raw", "zstd", "blosc"],
        "containers": ["file", "directory"],
        "encodings": ["f32", "f16", "bf16", "q8", "q4", "u8", "u32"],
        "levels": list(ANSWERS)[1:],
    }


def structure(request: Json) -> Json:
    """Manifest, arrays, geometry, chosen bundles."""
    import flashfmt

    with flashfmt.open(request["path"]) as model:
        chosen = []
        for layer, neuron in request["bundles"]:
            info, bundles = model.layers[layer], model.bundles(layer)
            start, stop = info.geometry.bundle_range(neuron)
            digest = hashlib.sha256(bundles.rows[neuron].tobytes()).hexdigest()
            chosen.append({"nbytes": stop - start, "offset": info.extent.offset + start, "sha256": digest})
        return {
            "bundles": [_bundles(info) for info in model.layers],
            "chosen": chosen,
            "container": model.container,
            "files": {
                role: {"filename": info.filename, "sha256": info.sha256, **_extent(f"files/{role}", 1, info.extent)}
                for role, info in model.files.items()
            },
            "manifest": _exact(model.manifest),
            "tensors": {
                name: {
                    "codec": info.codec,
                    "encoding": info.encoding.value,
                    "shape": list(info.shape),
                    "storage_shape": list(info.storage_shape),
                    **_extent(name, len(info.storage_shape), info.extent),
                }
                for name, info in model.tensors.items()
            },
        }


def _bundles(info: Any) -> Json:
    g = info.geometry
    return {
        "alignment": g.alignment,
        "d_model": info.d_model,
        "encoding": info.encoding.value,
        "n_neurons": g.n_neurons,
        "part_nbytes": info.part.nbytes,
        "parts": list(info.parts),
        "row_nbytes": g.row_nbytes,
        "stride": g.stride,
        **_extent(info.name, 3, info.extent),
    }


def _extent(name: str, n_dimensions: int, extent: Any) -> Json:
    return {"key": f"{name}/c" + "/0" * n_dimensions, "nbytes": extent.nbytes, "offset": extent.offset}


def _exact(value: Any) -> Any:
    """Typed objects as JSON, with binary64 numbers as 16 hex digits."""
    if hasattr(value, "__struct_fields__"):
        return {name: _exact(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, tuple):
        return [_exact(member) for member in value]
    return struct.pack(">d", value).hex() if isinstance(value, float) else value


def values(request: Json) -> Json:
    """Decoded tensors and bundles."""
    import flashfmt

    with flashfmt.open(request["path"]) as model:
        tensors = {}
        for name in request["tensors"]:
            stored = model.tensor(name, verify=True)
            tensors[name] = _summary(stored.decode() if stored.encoding.is_weight else stored.data)
        bundles = [_summary(model.bundles(layer).decode([neuron])) for layer, neuron in request["bundles"]]
        return {"bundles": bundles, "tensors": tensors}


def _summary(array: Any) -> Json:
    import numpy as np

    flat = np.ascontiguousarray(array).reshape(-1)
    flat = flat.astype("<f4" if flat.dtype.kind == "f" else "<u4")
    words = flat.view("<u4")
    samples = [f"{int(words[i]):08x}" for i in (0, len(words) // 2, len(words) - 1)]
    return {"samples": samples, "sha256": hashlib.sha256(flat.tobytes()).hexdigest()}


def integrity(request: Json) -> Json:
    """Every rule."""
    import flashfmt

    with flashfmt.open(request["path"]) as model:
        model.verify()
    return {"verified": True}


def selection(request: Json) -> Json:
    """Scores and active neurons of a layer's predictor."""
    import numpy as np

    import flashfmt
    from reference_engine.backends import load_backend
    from reference_engine.selectors import LowRankPredictor, selector_from_file

    inputs = np.frombuffer(base64.b64decode(request["inputs"]), "<f4").reshape(request["n_tokens"], -1)
    with flashfmt.open(request["path"]) as model:
        selector: Any = selector_from_file(model, request["layer"], load_backend("numpy"))
        scores = selector.scores(inputs.astype(np.float32))
        stored = model.predictor(request["layer"])
        if isinstance(selector, LowRankPredictor):
            scores = 1 / (1 + np.exp(-scores))
        elif stored is not None and not stored[0].signed:
            scores = np.abs(scores)
        active = [selector.select(inputs[t : t + 1]).tolist() for t in range(len(inputs))]
    return {"active": active, "scores": base64.b64encode(scores.astype("<f4").tobytes()).decode()}


def window(request: Json) -> Json:
    """Loaded and evicted neurons."""
    import numpy as np

    from reference_engine.neuron_window import LeastRecent, NeuronWindow, RecentTokens

    n = request["n_neurons"]
    rule: NeuronWindow
    if "k" in request:
        rule = RecentTokens(n, request["k"], request.get("capacity"))
    else:
        rule = LeastRecent(n, request["capacity"])
    steps = [rule.step(np.array(active, np.int32)) for active in request["trace"]]
    return {"evicted": [step.evicted.tolist() for step in steps], "loaded": [step.missing.tolist() for step in steps]}


def decode(request: Json) -> Json:
    """Logits behind every token."""
    from reference_engine.engine import Engine, EngineOptions

    with Engine(request["path"], EngineOptions(backend="numpy", verify="always")) as engine:
        engine.load()
        logits = engine.start().feed_all(request["tokens"])
    return {"logits": base64.b64encode(logits.astype("<f4").tobytes()).decode()}


ANSWERS: dict[str, Callable[[Json], Json]] = {
    "capabilities": capabilities,
    "structure": structure,
    "values": values,
    "integrity": integrity,
    "selection": selection,
    "window": window,
    "decode": decode,
}

if __name__ == "__main__":
    sys.exit(main())
