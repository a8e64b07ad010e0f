"""The synthetic models that benchmarks run: written once into a cache folder, used again when they are there.

Knows: names, sizes and completeness of files. Does not know: what is measured with them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import flashfmt
from flashfmt.encodings import Encoding
from flashfmt.errors import FlashError, FlashWriteError
from flashfmt.layout import round_up
from reference_engine.sizes import format_size
from reference_engine.step_progress import StepProgress
from reference_engine.synthetic import Shape, discard_synthetic, synthetic_nbytes, write_synthetic

RANK_MULTIPLE: Final = 64
_N_LAST: Final = 4  # layers with a predictor of a larger rank
_PUBLISHED_RANKS: Final = {"falcon-7b": (256, 1152)}


def predictor_ranks(shape: Shape) -> tuple[int, ...]:
    """Ranks of a shape's predictors, in the paper's proportions: of OPT-6.7B 128, in the last four layers 1024.

    None for shapes whose activation gives no zeros.
    """
    if not shape.is_sparse:
        return ()
    usual, last = _PUBLISHED_RANKS.get(
        shape.name,
        (round_up(shape.d_model // 32, RANK_MULTIPLE), round_up(shape.d_model // 4, RANK_MULTIPLE)),
    )
    n_last = min(_N_LAST, shape.n_layers)
    return (usual,) * (shape.n_layers - n_last) + (last,) * n_last


class SyntheticFiles:
    """Files of one shape in `folder`, by the encoding of their bundles. A context manager.

    Parameters
    ----------
    keep : leave what was written when the context ends; what was there before stays in any case.
    say : called with a line for people before a file is written.
    report : gets the progress of writing.
    """

    def __init__(
        self,
        shape: Shape,
        folder: Path,
        *,
        residents: Encoding,
        keep: bool,
        say: Callable[[str], None],
        report: StepProgress,
    ) -> None:
        self.shape = shape
        self._folder = folder
        self._residents = residents
        self._keep = keep
        self._say = say
        self._report = report
        self._written: list[Path] = []

    def path(self, encoding: Encoding) -> Path:
        """The file with bundles in `encoding`, written now if it is not there.

        Raises
        ------
        FlashWriteError
            If there is no room for it, or it cannot be written.
        FlashError
            If something else has its name.
        """
        path = self._folder / f"{self.shape.name}-{encoding}-residents-{self._residents}.flash"
        if path.exists():
            self._require_same(path, encoding)
        else:
            self._write(path, encoding)
            self._written.append(path)
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._keep:
            for path in self._written:
                path.unlink(missing_ok=True)

    def _write(self, path: Path, encoding: Encoding) -> None:
        ranks = predictor_ranks(self.shape)
        nbytes = synthetic_nbytes(
            self.shape, encoding=encoding, residents=self._residents, predictor_ranks=ranks
        )  # fmt: skip
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            raise FlashWriteError(f"cannot be used as a cache: {error.strerror}", path=self._folder) from error
        needed = nbytes + nbytes // 100
        if free < needed:
            raise FlashWriteError(
                f"no room for a synthetic {self.shape.name} of {format_size(nbytes)}",
                path=self._folder,
                expected=f"{needed} bytes free",
                actual=free,
            )
        self._say(f"writing a synthetic {self.shape.name}, {encoding} bundles, {format_size(nbytes)}: {path}")
        done = 0

        def progress(n: int) -> None:
            nonlocal done
            done += n
            self._report(f"writing {path.name}", done, nbytes)

        try:
            write_synthetic(
                path,
                self.shape,
                encoding=encoding,
                residents=self._residents,
                predictor_ranks=ranks,
                progress=progress,
            )
        except BaseException:
            discard_synthetic(
                path, self.shape, encoding=encoding, residents=self._residents, predictor_ranks=ranks
            )  # fmt: skip
            raise

    def _require_same(self, path: Path, encoding: Encoding) -> None:
        with flashfmt.open(path) as model:
            ranks = tuple(predictor.rank for predictor in model.manifest.predictors)
            same = (
                model.decoder == self.shape.decoder()
                and model.manifest.provenance.source_format == "synthetic"
                and ranks == predictor_ranks(self.shape)
                and all(info.encoding == encoding for info in model.layers)
                and model.tensors["embedding/tokens"].encoding == self._residents
            )
        if not same:
            raise FlashError("in the way of a synthetic model, and not the one that is needed: remove it", path=path)
