"""A Hugging Face checkpoint directory: config.json, safetensors shards, tokenizer files.

Tensors are read with pread into new arrays. The `safetensors` library is not used: it maps whole files, whose pages
would count against the memory of the process, and its numpy side has no bfloat16.

Knows: the files of such a directory and how a tensor lies in them. Does not know: families, the flash format.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashfmt.convert.bpe import tokenizer_from_bpe_files
from flashfmt.convert.checkpoint import (
    SourceFile,
    SourceFormat,
    SourceInfo,
    SourceTensor,
    identity,
    parse_json_object,
    read_exactly,
    read_limited,
)
from flashfmt.convert.safetensors_header import SafetensorsHeader, TensorEntry, read_header
from flashfmt.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_ROLES = {
    "config": (CONFIG,),
    "generation_config": ("generation_config.json",),
    "tokenizer": ("tokenizer.json",),
    "tokenizer_config": ("tokenizer_config.json",),
    "special_tokens_map": ("special_tokens_map.json",),
    "chat_template": ("chat_template.jinja",),
    "licence": ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"),
}
_JSON_ROLES = ("config", "generation_config", "tokenizer", "tokenizer_config", "special_tokens_map")
_README_LICENCE = re.compile(r"\A---\s*\n(?:.*\n)*?license:\s*[\"']?([\w.+-]{1,64})", re.MULTILINE)


class SafetensorsCheckpoint:
    """An opened checkpoint directory; see `flashfmt.convert.checkpoint.Checkpoint`.

    Parameters
    ----------
    path : the directory.
    source : name for provenance; by default the directory's own name.

    Raises
    ------
    CheckpointError
        If the directory is no complete safetensors checkpoint with plain float weights.
    """

    source_format: SourceFormat = "safetensors"

    def __init__(self, path: Path, source: str | None = None) -> None:
        self.path = path
        self.source = source or path.resolve().name
        _refuse_adapter(path)
        self.files: Mapping[str, SourceFile] = _files(path)
        if "config" not in self.files:
            raise CheckpointError("no config.json in the checkpoint directory", path=path)
        self.config: Mapping[str, Any] = parse_json_object(self.files["config"].content, path / CONFIG)
        _refuse_quantised(self.config, path / CONFIG)
        self.licence = _licence(path)
        self._fds: dict[str, int] = {}
        try:
            headers = self._open_shards()
            self._entries: dict[str, tuple[str, TensorEntry]] = {
                name: (shard, entry) for shard, header in headers.items() for name, entry in header.tensors.items()
            }
            self.tensors: Mapping[str, SourceInfo] = {
                name: _source_info(name, entry, path / shard) for name, (shard, entry) in self._entries.items()
            }
            self.sha256, self.fingerprint = self._identities(headers)
        except BaseException:
            self.close()
            raise

    def read(self, name: str, start: int = 0, stop: int | None = None) -> SourceTensor:
        """Rows [start, stop) of a tensor along its first axis, in a new array."""
        shard, entry = self._entries[name]
        encoding = self.tensors[name].encoding
        n_rows = entry.shape[0]
        stop = n_rows if stop is None else min(stop, n_rows)
        data = np.empty((stop - start, *entry.shape[1:]), encoding.storage_dtype)
        row_nbytes = entry.nbytes // n_rows
        read_exactly(self._fds[shard], data.data.cast("B"), entry.offset + start * row_nbytes, self.path / shard)
        return SourceTensor(encoding, data)

    def close(self) -> None:
        """Close the shards."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _open_shards(self) -> dict[str, SafetensorsHeader]:
        index_path = self.path / INDEX
        if (self.path / SINGLE).exists():
            return {SINGLE: self._open_shard(SINGLE)}
        if not index_path.exists():
            _refuse_other_weights(self.path)
        weight_map = parse_json_object(read_limited(index_path), index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError("no map of tensor names to shards", path=index_path, where="weight_map")
        headers = {shard: self._open_shard(shard) for shard in sorted(set(weight_map.values()))}
        for name, shard in weight_map.items():
            if name not in headers[shard].tensors:
                raise CheckpointError(
                    f"the index says {shard} holds a tensor that it lacks", path=index_path, where=name
                )
        for shard, header in headers.items():
            for name in header.tensors:
                if weight_map.get(name) != shard:
                    raise CheckpointError(f"{shard} holds a tensor that the index lacks", path=index_path, where=name)
        return headers

    def _open_shard(self, shard: str) -> SafetensorsHeader:
        path = self.path / shard
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError("shard name is no plain file name", path=self.path / INDEX, where=shard)
        try:
            self._fds[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise CheckpointError(f"missing shard {shard}", path=path) from error
        except OSError as error:
            raise CheckpointError(f"cannot be opened: {error.strerror}", path=path) from error
        return read_header(self._fds[shard], path)

    def _identities(self, headers: Mapping[str, SafetensorsHeader]) -> tuple[str, str]:
        content: dict[str, object] = {
            file.filename: hashlib.sha256(file.content).hexdigest() for file in self.files.values()
        }
        times: dict[str, object] = {}
        for shard, header in headers.items():
            status = os.fstat(self._fds[shard])
            content[shard] = [status.st_size, hashlib.sha256(header.raw).hexdigest()]
            times[shard] = status.st_mtime_ns
        return identity(content), identity({"content": content, "times": times})


def _files(path: Path) -> dict[str, SourceFile]:
    files = {}
    for role, names in _ROLES.items():
        name = next((name for name in names if (path / name).is_file()), None)
        if name is not None:
            files[role] = SourceFile(name, read_limited(path / name))
            if role in _JSON_ROLES:
                parse_json_object(files[role].content, path / name)
    if "tokenizer" not in files:
        files.update(_slow_tokenizer(path))
    if "chat_template" not in files and "tokenizer_config" in files:
        template = _template_of(parse_json_object(files["tokenizer_config"].content, path / "tokenizer_config.json"))
        if template is not None:
            files["chat_template"] = SourceFile("chat_template.jinja", template.encode())
    return files


def _slow_tokenizer(path: Path) -> Iterator[tuple[str, SourceFile]]:
    """A tokenizer.json made from vocab.json and merges.txt, which is all that OPT checkpoints carry."""
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        yield "tokenizer", SourceFile("tokenizer.json", tokenizer_from_bpe_files(path))
    elif any((path / name).is_file() for name in ("tokenizer.model", "spiece.model", "vocab.json")):
        raise CheckpointError(
            "no tokenizer.json; write one with transformers: "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)",
            path=path,
        )


def _template_of(tokenizer_config: Mapping[str, Any]) -> str | None:
    """The chat template of a tokenizer_config: a text, or the entry `default` of a list of named ones."""
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = entries[0].get("template") if entries else None
    return template if isinstance(template, str) else None


def _licence(path: Path) -> str | None:
    """The licence named in the front matter of README.md."""
    if not (path / "README.md").is_file():
        return None
    with (path / "README.md").open(encoding="utf-8", errors="replace") as file:
        match = _README_LICENCE.match(file.read(1 << 16))
    return match[1] if match else None


def _refuse_adapter(path: Path) -> None:
    if (path / "adapter_config.json").exists() and not (path / CONFIG).exists():
        raise CheckpointError(
            "an adapter without its base model; merge it into the base model and save that", path=path
        )


def _refuse_quantised(config: Mapping[str, Any], path: Path) -> None:
    quantisation = config.get("quantization_config") or config.get("compression_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise CheckpointError(
            "already quantised; convert the float checkpoint and choose an encoding instead",
            path=path,
            where="quantization_config",
            expected="absent",
            actual=method or "a quantised checkpoint",
        )


def _refuse_other_weights(path: Path) -> None:
    pickled = sorted(file.name for file in path.glob("*.bin")) + sorted(file.name for file in path.glob("*.pt*"))
    if pickled:
        raise CheckpointError(
            f"only pickled weights ({pickled[0]}), which can run code when loaded; save them as safetensors with "
            "transformers: AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory)",
            path=path,
        )
    raise CheckpointError(f"neither {SINGLE} nor {INDEX} in the checkpoint directory", path=path)


def _source_info(name: str, entry: TensorEntry, path: Path) -> SourceInfo:
    if entry.encoding is None:
        if name.endswith((".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".SCB")):
            reason = "already quantised; convert the float checkpoint and choose an encoding instead"
        else:
            reason = "unsupported dtype"
        raise CheckpointError(reason, path=path, where=name, expected="F32, F16 or BF16", actual=entry.dtype)
    if not entry.shape or 0 in entry.shape:
        raise CheckpointError(
            "empty or scalar tensor", path=path, where=name, actual=list(entry.shape), expected="rows"
        )
    return SourceInfo(entry.shape, entry.encoding)
