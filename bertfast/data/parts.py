"""Parts of shards: turn each file of a corpus into its parts in both splits, in several processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tqdm import tqdm

from bertfast.data.corpus import read_documents
from bertfast.data.held_out import HeldOut
from bertfast.data.shards import PartWriter, part_origin, token_dtype
from bertfast.data.tokenizer import encode_sentences
from bertfast.runtime.signals import interrupts_ignored

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

SPLITS = ("train", "validation")
BATCH_CHARACTERS = 500_000  # text tokenized in one call


@dataclass(frozen=True)
class Source:
    """One file of the corpus.

    Attributes:
        path: Where the file is when the run has ended.
        held_out: Which part of it is held out for validation.
        text_column: Field or column of its text.
        tokenizer_hash: Hash of the tokenizer.
        now: Where the file is until then; None: at `path`.
    """

    path: Path
    held_out: HeldOut
    text_column: str
    tokenizer_hash: str
    now: Path | None = None

    @property
    def file(self) -> Path:
        """The file to read."""
        return self.now or self.path

    @property
    def name(self) -> str:
        """Name of the file's part in each split."""
        return f"{self.path.name}-{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:8]}"

    @property
    def bytes(self) -> int:
        """Size of the file on disk."""
        return self.file.stat().st_size

    def origin(self) -> dict[str, object]:
        """Return everything that the parts depend on; while it is unchanged, they are up to date."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "modified": self.file.stat().st_mtime_ns,
            "held_out": self.held_out.description(),
            "text_column": self.text_column,
            "tokenizer_hash": self.tokenizer_hash,
        }

    def is_finished(self, folder: Path) -> bool:
        """Return whether both parts exist and are up to date."""
        return all(part_origin(folder / split, self.name) == self.origin() for split in SPLITS)


def prepare_files(sources: list[Source], tokenizer: Tokenizer, folder: Path, processes: int) -> None:
    if not sources:
        return
    with tqdm(total=sum(source.bytes for source in sources), desc="tokens", unit="B", unit_scale=True) as bar:
        processes = min(processes, len(sources))
        if processes <= 1:
            for source in sources:
                prepare_file(source, tokenizer, folder, bar.update)
            return
        context = multiprocessing.get_context("spawn")  # forked processes would lack the tokenizer's threads
        counter = context.Value("q", 0)
        threads = max(1, (os.cpu_count() or 1) // processes)
        with ProcessPoolExecutor(processes, context, _start_worker, (counter, threads)) as pool:
            with interrupts_ignored():  # which the processes that are started here inherit
                pending = {pool.submit(_prepare_in_worker, source, tokenizer, folder) for source in sources}
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.3)
                    for future in done:
                        future.result()
                    bar.update(counter.value - bar.n)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def prepare_file(source: Source, tokenizer: Tokenizer, folder: Path, progress: Callable[[int], object]) -> None:
    """Write the two parts of one file.

    Args:
        source: The file.
        tokenizer: The tokenizer; see `encode_sentences`.
        folder: Folder of the splits.
        progress: Called with the number of bytes read since its last call.
    """
    dtype, position = token_dtype(tokenizer.get_vocab_size()), 0

    def advance(to: int) -> None:
        nonlocal position
        progress(to - position)
        position = to

    documents = read_documents(source.file, source.text_column, advance)
    parts = [PartWriter(folder / split, source.name, dtype, source.origin()) for split in SPLITS]
    with parts[0] as train, parts[1] as validation:
        for batch in _batches(documents):
            divided = [source.held_out.divide(document) for document in batch]
            flat = [sentence for split in divided for sentences in split for sentence in sentences]
            encoded = encode_sentences(tokenizer, flat)
            for for_training, for_validation in divided:
                train.add([next(encoded) for _ in for_training])
                validation.add([next(encoded) for _ in for_validation])


def _batches(documents: Iterator[list[str]]) -> Iterator[list[list[str]]]:
    """Group documents so that a group has a little more than BATCH_CHARACTERS."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += sum(map(len, document))
        if characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


_bytes_read: Synchronized[int]  # set in a worker process: shared counter of the bytes that all workers have read


def _start_worker(counter: Synchronized[int], threads: int) -> None:
    global _bytes_read
    _bytes_read = counter
    os.environ["RAYON_NUM_THREADS"] = str(threads)


def _prepare_in_worker(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    def progress(count: int) -> None:
        with _bytes_read.get_lock():
            _bytes_read.value += count

    prepare_file(source, tokenizer, folder, progress)
