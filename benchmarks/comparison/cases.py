"""What is compared with what, in how much memory, and what was aimed at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from reference_engine.sizes import parse_size
from reference_engine.synthetic import SHAPES, Shape

Basis = Literal["unquantised", "own"]


@dataclass(frozen=True, slots=True)
class Case:
    """A comparison.

    Attributes
    ----------
    encoding, residents : of our bundles and resident matrices.
    limit : ``none``, a size, or a share in per cent of `basis`.
    basis : the whole model in float16, the same for all, or the bytes of the file that each contender runs.
    n_tokens, n_warm : tokens timed, and before them those that are not, for contenders that hold the whole model or
        leave neurons out; the others read most of the model for each token, and get `n_slow` tokens after one.
    targets : least ratio of a contender's time to ours that was aimed at.
    """

    name: str
    shape: str
    encoding: str
    residents: str
    limit: str
    contenders: tuple[str, ...]
    targets: dict[str, float]
    basis: Basis = "unquantised"
    n_tokens: int = 32
    n_warm: int = 4
    n_slow: int = 4


_SPARSE: Final = ("ours-sparse", "ours-sparse-plain", "ours-sparse-mmap", "naive", "llama.cpp", "accelerate")
_SPARSE_TARGETS: Final = {"naive": 20.0, "llama.cpp": 15.0, "accelerate": 15.0}
_DENSE: Final = ("ours", "ours-mmap", "naive", "llama.cpp", "accelerate")


def _resident(shape: str, encoding: str, target: float) -> Case:
    names = ("ours", "llama.cpp", "llama.cpp-repack") + (("accelerate",) if encoding == "f16" else ())
    targets = {"llama.cpp": target, "llama.cpp-repack": target}
    return Case(f"resident-{shape}-{encoding}", shape, encoding, encoding, "none", names, targets)


def _half(shape: str) -> Case:
    return Case(f"half-{shape}-f16", shape, "f16", "f16", "50%", _DENSE, {"llama.cpp": 2.0}, n_tokens=4, n_warm=1)


def _sparse(shape: str, n_slow: int) -> Case:
    return Case(
        f"sparse-{shape}-f16",
        shape,
        "f16",
        "q8",
        "50%",
        _SPARSE,
        _SPARSE_TARGETS,
        n_tokens=48,
        n_warm=48,
        n_slow=n_slow,
    )


def _sparse_q4(shape: str, limit: str) -> Case:
    names = ("ours-sparse", "ours-sparse-mmap", "naive", "llama.cpp")
    name = f"sparse-{shape}-q4" if limit == "50%" else f"sparse-{shape}-q4-{limit}"
    return Case(
        name, shape, "q4", "q4", limit, names, {"llama.cpp": 8.0}, basis="own", n_tokens=48, n_warm=48, n_slow=6
    )


SUITE: Final[dict[str, Case]] = {
    case.name: case
    for case in (
        _resident("llama-1.1b", "f16", 1.1),
        _resident("llama-1.1b", "q8", 1.0),
        _resident("llama-1.1b", "q4", 1.0),
        _half("llama-1.1b"),
        _sparse("opt-1.3b", 5),
        _sparse_q4("opt-1.3b", "50%"),
        _sparse_q4("opt-1.3b", "75%"),
        _sparse_q4("opt-6.7b", "50%"),
        _sparse("opt-6.7b", 3),
        replace(_half("llama-2-7b"), contenders=("ours", "ours-mmap", "llama.cpp"), n_tokens=3, n_slow=3),
    )
}


def shape_of(case: Case) -> Shape:
    """The sizes of a case's model."""
    return SHAPES[case.shape]


def memory_limit(limit: str, basis_nbytes: int) -> int | None:
    """Bytes of ``none``, ``50%`` of `basis_nbytes`, or a size such as ``2GiB``.

    Raises
    ------
    ValueError
        If the text is none of these.
    """
    if limit == "none":
        return None
    if limit.endswith("%"):
        return int(basis_nbytes * float(limit[:-1]) / 100)
    return parse_size(limit)


def tokens_of(case: Case, contender: str) -> tuple[int, int]:
    """(tokens before the timed ones, timed ones) for a contender."""
    is_slow = case.limit != "none" and "sparse" not in contender
    return (1, case.n_slow) if is_slow else (case.n_warm, case.n_tokens)


def disk_groups(forms: dict[str, str], sizes: dict[str, int], room: int) -> list[list[str]]:
    """Contenders that are run in turn, so that the forms of a group fit on the disk together.

    Parameters
    ----------
    forms : form of the model by contender, in the order wanted; the first contender is the one compared with.
    sizes : bytes by form.
    room : bytes on the disk.

    Returns
    -------
    One group where all fit; else a group for each form that is not the first contender's. The first contender is in
    all of them, others of its form in the first.
    """
    if sum(sizes[form] for form in set(forms.values())) <= room:
        return [list(forms)]
    first = next(iter(forms))
    groups: dict[str, list[str]] = {}
    for name, form in forms.items():
        if form != forms[first]:
            groups.setdefault(form, []).append(name)
    together = [[first, *names] for names in groups.values()] or [[first]]
    together[0] += [name for name, form in forms.items() if form == forms[first] and name != first]
    return together
