"""Read text files as streams of documents; a document is a list of paragraphs, each a single line.

`.txt`: one paragraph per line, and a blank line between documents. `.jsonl`: one document per line, in a field whose
lines are paragraphs. Both may be compressed (`.gz`, `.xz`, `.bz2`, `.zst`). `.parquet`: one document per row, in a
column whose lines are paragraphs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bertfast.data.text_files import COMPRESSIONS, json_object, read_lines, require_rereadable
from bertfast.runtime.extras import install_command
from bertfast.runtime.output_folder import RECORD

logger = logging.getLogger("bertfast")

SUFFIXES = (*(f"{form}{compression}" for form in (".txt", ".jsonl") for compression in COMPRESSIONS), ".parquet")
MAX_DOCUMENT_CHARACTERS = 1_000_000  # longer documents of .txt files are split, which bounds memory


def find_files(inputs: Iterable[Path | str]) -> list[Path]:
    """Return the text files that `inputs` name, in a fixed order and without duplicates.

    Folders are searched recursively, also through links. In them, hidden files and folders, which editors and operating
    systems write, are left out, and so are output folders of this package.

    Args:
        inputs: Files and folders.

    Raises:
        FileNotFoundError: One of them, or the target of a link in a folder, does not exist.
        ValueError: A file has an unknown suffix or is a pipe, or a folder has no text file.
    """
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(_files_below(path))
            if not found:
                raise ValueError(f"the folder {path} holds no text: the file types are {', '.join(SUFFIXES)}")
            files += found
        elif not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}")
        else:
            require_rereadable(path)
            if not path.name.endswith(SUFFIXES):
                raise ValueError(f"{path} is of an unknown file type: use one of {', '.join(SUFFIXES)}")
            files.append(path)
    return list(dict.fromkeys(file.resolve() for file in files))


def _files_below(top: Path) -> Iterator[Path]:
    """Yield the text files in a folder and the folders below it."""
    seen = set()
    for name, folders, files in os.walk(top, followlinks=True, onerror=_raise):
        folder = Path(name)
        if folder.resolve() in seen or (folder != top and RECORD in files):
            folders.clear()  # a link to a folder that has been searched, or an output folder
            if RECORD in files:
                logger.warning("%s is left out: it is the output of a run; name it as well to read it", folder)
            continue
        seen.add(folder.resolve())
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for file in files:
            path = folder / file
            if file.startswith(".") or not file.endswith(SUFFIXES):
                continue
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is a link to {os.readlink(path)}, which does not exist: remove the link"
                )
            if path.is_file():
                yield path


def _raise(error: OSError) -> None:
    raise error


def read_documents(
    path: Path, text_column: str = "text", progress: Callable[[int], None] = lambda position: None
) -> Iterator[list[str]]:
    """Yield the documents of a text file, each a list of non-empty paragraphs; an empty file has none.

    Args:
        path: A file of one of SUFFIXES.
        text_column: Field of `.jsonl` and column of `.parquet` files that holds the text.
        progress: Called with the number of bytes of the file read so far.

    Raises:
        ValueError: Something cannot be read; the message names file and line.
    """
    if path.suffix == ".parquet":
        documents = _rows(path, text_column, progress)
    elif ".jsonl" in path.suffixes[-2:]:
        documents = _records(path, text_column, progress)
    else:
        documents = _paragraph_lines(path, progress)
    for document in documents:
        paragraphs = [stripped for line in document if (stripped := line.strip())]
        if paragraphs:
            yield paragraphs


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
        record = json_object(f"{path}, line {number}", line, f'{{"{text_column}": "…"}}')
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
        raise ImportError(f"{path}: reading Parquet requires pyarrow: {install_command('parquet')}") from None
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
