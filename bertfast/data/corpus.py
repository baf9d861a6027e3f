"""Read text files as streams of documents; a document is a list of paragraphs, each a single line.

`.txt`: one paragraph per line, and a blank line between documents. `.jsonl`: one document per line, in a field whose
lines are paragraphs. Both may be compressed (`.gz`, `.xz`, `.bz2`, `.zst`). `.parquet`: one document per row, in a
column whose lines are paragraphs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bertfast.data.text_files import COMPRESSIONS, json_object, read_lines

SUFFIXES = (*(f"{form}{compression}" for form in (".txt", ".jsonl") for compression in COMPRESSIONS), ".parquet")
MAX_DOCUMENT_CHARACTERS = 1_000_000  # longer documents of .txt files are split, which bounds memory


def find_files(inputs: Iterable[Path | str]) -> list[Path]:
    """Return the text files that `inputs` name, in a fixed order and without duplicates.

    Args:
        inputs: Files, and folders that are searched recursively.

    Raises:
        FileNotFoundError: One of them does not exist.
        ValueError: A file has an unknown suffix, or a folder has no text file.
    """
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
            if not found:
                raise ValueError(f"the folder {path} holds no text: the file types are {', '.join(SUFFIXES)}")
            files += found
        elif not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}")
        elif not path.name.endswith(SUFFIXES):
            raise ValueError(f"{path} is of an unknown file type: use one of {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    return list(dict.fromkeys(file.resolve() for file in files))


def read_documents(
    path: Path, text_column: str = "text", progress: Callable[[int], None] = lambda position: None
) -> Iterator[list[str]]:
    """Yield the documents of a text file, each a list of non-empty paragraphs.

    Args:
        path: A file of one of SUFFIXES.
        text_column: Field of `.jsonl` and column of `.parquet` files that holds the text.
        progress: Called with the number of bytes of the file read so far.

    Raises:
        ValueError: Something cannot be read, or there is no text; the message names file and line.
    """
    if path.suffix == ".parquet":
        documents = _rows(path, text_column, progress)
    elif ".jsonl" in path.suffixes[-2:]:
        documents = _records(path, text_column, progress)
    else:
        documents = _paragraph_lines(path, progress)
    empty = True
    for document in documents:
        paragraphs = [stripped for line in document if (stripped := line.strip())]
        if paragraphs:
            empty = False
            yield paragraphs
    if empty:
        raise ValueError(f"{path} holds no text")


def held_out(paragraphs: list[str], percentage: float) -> bool:
    """Return whether a document is for validation, decided by a hash of its text, so equal documents stay together."""
    digest = hashlib.blake2b("\n".join(paragraphs).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < percentage / 100 * 2**64


def _paragraph_lines(path: Path, progress: Callable[[int], None]) -> Iterator[list[str]]:
    document: list[str] = []
    characters = 0
    for _, line in read_lines(path, progress):
        if not line.strip() or characters > MAX_DOCUMENT_CHARACTERS:
            yield document
            document, characters = [], 0
        document.append(line)
        characters += len(line)
    yield document


def _records(path: Path, text_column: str, progress: Callable[[int], None]) -> Iterator[list[str]]:
    for number, line in read_lines(path, progress):
        if not line.strip():
            continue
        record = json_object(path, number, line, f'{{"{text_column}": "…"}}')
        text = record.get(text_column)
        if not isinstance(text, str):
            fields = ", ".join(record) or "none"
            raise ValueError(
                f"{path}, line {number}: no text in a field {text_column!r} (fields: {fields}); see --text-column"
            )
        yield text.splitlines()


def _rows(path: Path, text_column: str, progress: Callable[[int], None]) -> Iterator[list[str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f'{path}: reading Parquet requires pyarrow; run pip install "bertfast[parquet]"') from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged or not Parquet ({error})") from None
    if text_column not in file.schema_arrow.names:
        raise ValueError(
            f"{path}: no column {text_column!r} (columns: {', '.join(file.schema_arrow.names)}); see --text-column"
        )
    row = 0
    for batch in file.iter_batches(batch_size=1000, columns=[text_column]):
        for text in batch.column(0).to_pylist():
            row += 1
            if not isinstance(text, str):
                raise ValueError(f"{path}, row {row}: column {text_column!r} holds {text!r}, not a text")
            progress(path.stat().st_size * row // file.metadata.num_rows)
            yield text.splitlines()
