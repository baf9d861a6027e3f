"""Token shards: memory-mapped documents, each a list of sentences of token ids, with a manifest.

A shards folder holds `manifest.json` and one folder per part, usually one part per file of the corpus:

    tokens.bin            token ids end to end, uint16 or uint32, without [CLS] and [SEP]
    sentence_starts.bin   int64 offsets into the tokens, one per sentence, and the number of tokens
    document_starts.bin   int64 offsets into the sentences, one per document, and the number of sentences
    part.json             counts, dtype, checksums and origin of the part

All numbers are little-endian. A part is written under a temporary name and renamed, so existing parts are complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypedDict, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from bertfast.data.text_files import read_json
from bertfast.runtime.atomic_write import atomic_path, write_atomically

logger = logging.getLogger("bertfast")

FORMAT = "bertfast shards 2"
FILES = ("tokens", "sentence_starts", "document_starts")


class PartDescription(TypedDict):
    """What the manifest says about a part; `part.json` holds the same without the name."""

    name: str
    documents: int
    sentences: int
    tokens: int
    dtype: str
    checksums: dict[str, str]
    origin: object


class Manifest(TypedDict):
    """Contents of `manifest.json`; the counts are sums over all parts."""

    format: str
    vocab_size: int
    tokenizer_hash: str
    documents: int
    sentences: int
    tokens: int
    parts: list[PartDescription]


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the narrower of uint16 and uint32 that represents every token id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class Part:
    """One memory-mapped part of a shards folder.

    Attributes:
        tokens: uint16 or uint32 [tokens], the ids of all sentences end to end.
        sentence_starts: int64 [sentences + 1], offsets into `tokens`; the last is the number of tokens.
        document_starts: int64 [documents + 1], offsets into the sentences; the last is the number of sentences.
    """

    tokens: np.ndarray
    sentence_starts: np.ndarray
    document_starts: np.ndarray


class PartWriter:
    """Context manager that writes one part, document by document.

    When the block ends without an exception, the part replaces `folder/name`; otherwise nothing changes.

    Args:
        folder: The shards folder.
        name: Name of the part.
        dtype: dtype of the token ids, see `token_dtype`.
        origin: Any JSON value, stored in `part.json`: what the part is made from.
    """

    def __init__(self, folder: Path | str, name: str, dtype: DTypeLike, origin: object = None):
        self.target = Path(folder) / name
        token_ids = np.dtype(dtype).newbyteorder("<")
        self.dtypes = {"tokens": token_ids, "sentence_starts": np.dtype("<i8"), "document_starts": np.dtype("<i8")}
        self.origin = origin
        self.documents = self.sentences = self.tokens = 0
        self.files: dict[str, BinaryIO] = {}
        self.digests = {name: hashlib.sha256() for name in FILES}
        self._opened = ExitStack()

    def __enter__(self) -> PartWriter:
        with ExitStack() as opened:
            self.temporary = opened.enter_context(atomic_path(self.target))
            self.temporary.mkdir()
            for name in FILES:
                self.files[name] = opened.enter_context((self.temporary / f"{name}.bin").open("wb"))
            self._append("sentence_starts", [0])
            self._append("document_starts", [0])
            self._opened = opened.pop_all()
        return self

    def add(self, document: Sequence[Sequence[int]]) -> None:
        """Append a document, a sequence of token ids per sentence; empty sentences and documents are dropped."""
        sentences = [sentence for sentence in document if len(sentence)]
        if not sentences:
            return
        ends = self.tokens + np.cumsum([len(sentence) for sentence in sentences])
        self.documents += 1
        self.sentences += len(sentences)
        self.tokens = int(ends[-1])
        self._append("tokens", np.concatenate(sentences))
        self._append("sentence_starts", ends)
        self._append("document_starts", [self.sentences])

    def _append(self, name: str, values: ArrayLike) -> None:
        content = np.asarray(values).astype(self.dtypes[name]).tobytes()
        self.files[name].write(content)
        self.digests[name].update(content)

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error_type is not None:
            self._opened.__exit__(error_type, error, traceback)
            return
        description = {
            "documents": self.documents,
            "sentences": self.sentences,
            "tokens": self.tokens,
            "dtype": self.dtypes["tokens"].name,
            "checksums": {name: digest.hexdigest() for name, digest in self.digests.items()},
            "origin": self.origin,
        }
        with self._opened:  # closes the files, of which the last writes may fail, and renames the folder
            (self.temporary / "part.json").write_text(json.dumps(description, indent=1))


def write_part(
    folder: Path | str, name: str, documents: Iterable[Sequence[Sequence[int]]], dtype: DTypeLike = np.uint16
) -> None:
    """Write `documents`, each a sequence of sentences, which are sequences of token ids, as the part `folder/name`."""
    with PartWriter(folder, name, dtype) as part:
        for document in documents:
            part.add(document)


def part_origin(folder: Path | str, name: str) -> object:
    """Return the origin of the finished part `folder/name`; None if there is no such part, or if it is damaged."""
    path = Path(folder) / name
    if not (path / "part.json").exists():
        return None
    try:
        description = cast(PartDescription, read_json(path / "part.json"))
        if description["documents"]:
            _open_part(path, description)
        return description["origin"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged and is written again: %s", path, str(error).partition(";")[0])
        return None


def write_manifest(folder: Path | str, names: Iterable[str], *, vocab_size: int, tokenizer_hash: str) -> None:
    """Write the manifest of a shards folder, which consists of the finished parts `names` in that order."""
    folder = Path(folder)
    parts: list[PartDescription] = [
        cast(PartDescription, {"name": name} | read_json(folder / name / "part.json")) for name in names
    ]
    manifest: Manifest = {
        "format": FORMAT,
        "vocab_size": vocab_size,
        "tokenizer_hash": tokenizer_hash,
        "documents": sum(part["documents"] for part in parts),
        "sentences": sum(part["sentences"] for part in parts),
        "tokens": sum(part["tokens"] for part in parts),
        "parts": parts,
    }
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1))


@dataclass(frozen=True)
class Shards:
    """A folder of token shards, opened for reading.

    Attributes:
        folder: The folder.
        parts: Its parts that hold documents.
        documents, sentences, tokens: Counts over all parts.
        vocab_size: Size of the tokenizer's vocabulary.
        tokenizer_hash: See `bertfast.data.tokenizer.tokenizer_hash`.
        content_hash: Hexadecimal SHA-256 of the checksums of all parts.
    """

    folder: Path
    parts: list[Part]
    documents: int
    sentences: int
    tokens: int
    vocab_size: int
    tokenizer_hash: str
    content_hash: str

    @classmethod
    def open(cls, folder: Path | str, tokenizer_hash: str | None = None) -> Shards:
        """Memory-map the shards in `folder`.

        Args:
            folder: A folder that `bertfast prepare` wrote.
            tokenizer_hash: If given, shards of any other tokenizer are refused.

        Raises:
            FileNotFoundError: There are no shards.
            ValueError: They are damaged, of another format, or of another tokenizer.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if tokenizer_hash is not None and tokenizer_hash != manifest["tokenizer_hash"]:
            raise ValueError(
                f"the shards in {folder} were made with another tokenizer ({manifest['tokenizer_hash'][:12]}, not "
                f"{tokenizer_hash[:12]}): run `bertfast prepare` again with this one"
            )
        parts = [_open_part(folder / part["name"], part) for part in manifest["parts"] if part["documents"]]
        checksums = json.dumps([part["checksums"] for part in manifest["parts"]], sort_keys=True)
        return cls(
            folder,
            parts,
            documents=manifest["documents"],
            sentences=manifest["sentences"],
            tokens=manifest["tokens"],
            vocab_size=manifest["vocab_size"],
            tokenizer_hash=manifest["tokenizer_hash"],
            content_hash=hashlib.sha256(checksums.encode()).hexdigest(),
        )

    def verify(self) -> None:
        """Read all files and compare their checksums.

        Raises:
            ValueError: A file is damaged.
        """
        for part in read_manifest(self.folder)["parts"]:
            for name, checksum in part["checksums"].items():
                path = self.folder / part["name"] / f"{name}.bin"
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
                        raise ValueError(
                            f"{path} is damaged: its checksum differs from the manifest's; run `bertfast prepare` again"
                        )


def read_manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    try:
        manifest = cast(Manifest, read_json(path))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no manifest.json: give --data-dir a folder that `bertfast prepare` wrote"
        ) from None
    except ValueError as error:
        raise ValueError(f"{error}; run `bertfast prepare` again") from None
    found = manifest.get("format")
    if found != FORMAT:
        raise ValueError(
            f"{path} has format {found!r}, not {FORMAT!r}: it is from another version; run `bertfast prepare` again"
        )
    return manifest


def _open_part(folder: Path, description: PartDescription) -> Part:
    counts = (description["tokens"], description["sentences"] + 1, description["documents"] + 1)
    arrays = []
    for name, count, dtype_name in zip(FILES, counts, (description["dtype"], "int64", "int64"), strict=True):
        path, dtype = folder / f"{name}.bin", np.dtype(dtype_name).newbyteorder("<")
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing, though the manifest lists it; run `bertfast prepare` again")
        if path.stat().st_size != count * dtype.itemsize:
            raise ValueError(
                f"{path} is damaged: it has {path.stat().st_size} bytes instead of {count * dtype.itemsize}; "
                "run `bertfast prepare` again"
            )
        arrays.append(np.memmap(path, dtype, mode="r"))
    part = Part(*arrays)
    if part.sentence_starts[-1] != counts[0] or part.document_starts[-1] != description["sentences"]:
        raise ValueError(
            f"{folder} is damaged: its boundaries do not end at its last token; run `bertfast prepare` again"
        )
    return part
