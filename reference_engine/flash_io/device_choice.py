"""From measurements to a profile: backend, depth, longest gap, largest request, each with its reason. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from reference_engine.flash_io.device_profile import DEFAULT_BACKENDS, DeviceProfile, Measurement
from reference_engine.flash_io.range_reader import IoTuning

REFERENCE_BLOCK: Final = 16 << 10  # the size of a bundle of a model of 7 billion parameters
_SMALL_BLOCKS: Final = range(4 << 10, (64 << 10) + 1)
_NEARLY: Final = 0.95
_NOISE: Final = 0.9  # backends closer than this are told apart by processor time
_MIN_DEPTH: Final = 256
_GAP_UNIT: Final = 4 << 10
_MAX_GAP: Final = 64 << 10
_MIN_REQUEST: Final = 64 << 10


def choose_profile(measurements: Sequence[Measurement]) -> DeviceProfile:
    """The profile that `measurements` speak for; they must hold random reads of `REFERENCE_BLOCK`.

    - backend: the fastest at random blocks up to 64 KiB; of those within 10 % of it, the one with least processor time.
    - depth: the smallest from 256 on, or else the largest, that reaches 95 % of the best at `REFERENCE_BLOCK`. The
      device may be content with less, but what is beyond the depth is begun only while somebody waits.
    - gap: time of a request is fitted as ``a + b * bytes``; reading through ``a / b`` bytes costs what a request saves.
    - largest request: the smallest block that reaches 95 % of the best bandwidth, at that depth or less.
    """
    random = [m for m in measurements if m.pattern == "random" and m.backend in DEFAULT_BACKENDS]
    backend, why_backend = _choose_backend(random)
    own = [m for m in random if m.backend == backend]
    depth, why_depth = _choose_depth(own)
    fastest: dict[int, Measurement] = {}  # by block: large ones are not measured at great depths
    for m in own:
        if m.depth <= depth:
            fastest[m.block_bytes] = max(m, fastest.get(m.block_bytes, m), key=lambda each: each.bytes_per_second)
    by_block = [fastest[block] for block in sorted(fastest)]
    max_request, why_request = _choose_request(by_block)
    gap, why_gap = _choose_gap(by_block)
    tuning = IoTuning(gap_bytes=min(gap, max_request - _GAP_UNIT), max_request_bytes=max_request, depth=depth)
    return DeviceProfile(
        backend=backend,
        tuning=tuning,
        is_measured=True,
        reasons=(why_backend, why_depth, why_request, why_gap),
        measurements=tuple(measurements),
    )


def _choose_backend(random: Sequence[Measurement]) -> tuple[str, str]:
    scores: dict[str, float] = {}
    cpu: dict[str, float] = {}
    for backend in dict.fromkeys(m.backend for m in random):
        best: dict[int, Measurement] = {}
        for m in random:
            if m.backend == backend and m.block_bytes in _SMALL_BLOCKS:
                fastest = best.get(m.block_bytes, m)
                best[m.block_bytes] = max(m, fastest, key=lambda each: each.bytes_per_second)
        scores[backend] = float(np.exp(np.mean([np.log(m.bytes_per_second) for m in best.values()])))
        cpu[backend] = float(np.mean([m.cpu_seconds_per_gib for m in best.values()]))
    near = [name for name, score in scores.items() if score >= _NOISE * max(scores.values())]
    chosen = min(near, key=lambda name: cpu[name])
    told = ", ".join(f"{name} {scores[name] / 2**30:.2f} GiB/s {cpu[name]:.2f} CPU-s/GiB" for name in scores)
    return chosen, f"backend {chosen}: least processor time of the fastest (random 4 to 64 KiB: {told})"


def _choose_depth(own: Sequence[Measurement]) -> tuple[int, str]:
    speed = {m.depth: m.bytes_per_second for m in own if m.block_bytes == REFERENCE_BLOCK}
    nearly = [d for d, s in speed.items() if s >= _NEARLY * max(speed.values())]
    depth = min((d for d in nearly if d >= _MIN_DEPTH), default=max(nearly))
    return depth, f"depth {depth}: 95 % of the best bandwidth at random 16 KiB, and work for while nobody waits"


def _choose_request(by_block: Sequence[Measurement]) -> tuple[int, str]:
    best = max(m.bytes_per_second for m in by_block)
    nearly = min(m.block_bytes for m in by_block if m.bytes_per_second >= _NEARLY * best)
    size = max(nearly, _MIN_REQUEST)
    return size, f"requests up to {size >> 10} KiB: smallest with 95 % of the best {best / 2**30:.2f} GiB/s"


def _choose_gap(by_block: Sequence[Measurement]) -> tuple[int, str]:
    sizes = np.array([m.block_bytes for m in by_block], float)
    seconds = np.array([m.block_bytes / m.bytes_per_second for m in by_block])
    if len(sizes) < 2:
        return 0, "gaps are not read through: too few block sizes were measured"
    columns = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]  # relative errors count alike
    (fixed, per_byte), *_ = np.linalg.lstsq(columns, np.ones_like(seconds), rcond=None)
    if fixed <= 0 or per_byte <= 0:
        return 0, "gaps are not read through: a request costs no time of its own here"
    gap = min(int(fixed / per_byte) // _GAP_UNIT * _GAP_UNIT, _MAX_GAP)
    return gap, (
        f"gaps up to {gap >> 10} KiB are read through: a request costs {fixed * 1e6:.1f} us, "
        f"and {per_byte * 1024 * 1e6:.2f} us a KiB"
    )
