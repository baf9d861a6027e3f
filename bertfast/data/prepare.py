"""`bertfast prepare`: tokenize text into a folder with a tokenizer and the shards of `train` and `validation`.

Each file of the corpus becomes one part of each split, independently of other files: in any order, in several processes
or on several machines (`--part`). An interrupted run continues; a folder of another corpus is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from tokenizers import Tokenizer
from tqdm import tqdm

from bertfast.data.corpus import find_files, read_documents
from bertfast.data.docstrings import gather_docstrings
from bertfast.data.held_out import HeldOut
from bertfast.data.prepare_settings import CorpusSettings, PrepareSettings
from bertfast.data.shards import PartWriter, part_origin, token_dtype, write_manifest
from bertfast.data.text_files import named_standard_input, standard_input
from bertfast.data.tokenizer import (
    encode_sentences,
    load_tokenizer,
    save_tokenizer,
    tokenizer_files,
    tokenizer_hash,
    train_tokenizer,
)
from bertfast.runtime.atomic_write import atomic_path, named_in_errors
from bertfast.runtime.output_folder import LOCK, Origin, check_contents, locked_folder, require_command
from bertfast.runtime.settings import counted

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

__all__ = ["CorpusSettings", "PrepareSettings", "prepare", "prepare_file"]

logger = logging.getLogger("bertfast")

SPLITS = ("train", "validation")
TOKENIZER = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
# Characters to train a vocabulary on, divided equally among the files; more text hardly changes the vocabulary.
MAX_VOCABULARY_CHARACTERS = 300_000_000
BATCH_CHARACTERS = 500_000  # text tokenized in one call


@dataclass(frozen=True)
class Source:
    """One file of the corpus, which part of it is held out for validation, and the tokenizer's hash."""

    path: Path
    held_out: HeldOut
    text_column: str
    tokenizer_hash: str

    @property
    def name(self) -> str:
        """Name of the file's part in each split."""
        return f"{self.path.name}-{hashlib.sha256(str(self.path).encode()).hexdigest()[:8]}"

    @property
    def bytes(self) -> int:
        """Size of the file on disk."""
        return self.path.stat().st_size

    def origin(self) -> dict[str, object]:
        """Return everything that the parts depend on; while it is unchanged, they are up to date."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "modified": self.path.stat().st_mtime_ns,
            "held_out": self.held_out.description(),
            "text_column": self.text_column,
            "tokenizer_hash": self.tokenizer_hash,
        }

    def is_finished(self, folder: Path) -> bool:
        """Return whether both parts exist and are up to date."""
        return all(part_origin(folder / split, self.name) == self.origin() for split in SPLITS)


def prepare(settings: PrepareSettings) -> Path:
    """Write a tokenizer and the shards of both splits.

    With `settings.part`, only that part of the files is processed, and a last run with `merge` writes the manifests.

    Returns:
        The folder. `Shards.open` opens its subfolders `train` and `validation`; the latter may have no documents.

    Raises:
        ValueError: The settings contradict each other, a file cannot be read, there is too little text, or the folder
            is in use.
        OriginError: The folder has shards of other text or other settings.
    """
    corpus = settings.corpus
    folder = Path(settings.output_dir)
    copy = folder.resolve() / "standard-input.txt"
    lock = LOCK if settings.part is None else f"{LOCK}-{settings.part.replace('/', '-of-')}"
    with locked_folder(folder, lock), named_standard_input(copy):
        require_command(folder, "prepare")
        # The copy of an earlier run is replaced at the end of this block, after all checks.
        with atomic_path(copy) if "-" in corpus.train_file else nullcontext(copy) as new_copy:
            train = _training_files(corpus, folder, new_copy)
            validation = find_files(corpus.validation_file)
            if both := set(train) & set(validation):
                raise ValueError(f"{min(both)} is both in --train-file and in --validation-file")
            # Parts have records of their own: those of files that are unchanged are kept.
            contents = TOKENIZER if settings.overwrite_output_dir else (*SPLITS, *TOKENIZER)
            origin = _origin(corpus, train, validation)
            for files in filter(None, (train, validation)):
                _require_text(files, corpus.text_column)
            percentage = 0 if validation else corpus.validation_split_percentage
            held_out = HeldOut.of_corpus(percentage, lambda: _documents(train, corpus.text_column))
            with FileLock(folder / f"{LOCK}-tokenizer"):  # machines with different parts may start at the same time
                begin = check_contents(folder, origin, contents, overwrite=settings.overwrite_output_dir)
                tokenizer = _tokenizer(corpus, train, held_out, None if settings.overwrite_output_dir else folder)
                begin()
                save_tokenizer(tokenizer, folder)
        train = [copy if path == new_copy else path for path in train]
        with named_in_errors(folder):
            _prepare(settings, train, validation, held_out, tokenizer, folder)
    return folder


def _origin(corpus: CorpusSettings, train: list[Path], validation: list[Path]) -> Origin:
    """Return what the shards are made from."""
    inputs = {"--train-file": train, "--validation-file": validation}
    values: dict[str, object] = {"--text-column": corpus.text_column}
    if not validation:
        values["--validation-split-percentage"] = corpus.validation_split_percentage
    if corpus.tokenizer_name is None:
        values |= {"--vocab-size": corpus.vocab_size, "--cased": corpus.cased}
        if corpus.tokenizer_type not in (None, "wordpiece"):
            values["--tokenizer-type"] = corpus.tokenizer_type
            values["--bert-special-tokens"] = corpus.bert_special_tokens
    else:
        inputs["--tokenizer-name"] = tokenizer_files(corpus.tokenizer_name)
    return Origin(inputs, values, "prepare")


def _tokenizer(corpus: CorpusSettings, train: list[Path], held_out: HeldOut, interrupted: Path | None) -> Tokenizer:
    """Return the tokenizer to use; one that an interrupted run has trained is not trained again.

    Args:
        corpus: Which tokenizer to use.
        train: Training files.
        held_out: Which part of them is held out.
        interrupted: Folder of an interrupted run on the same text with the same settings; None: there is none.
    """
    if corpus.tokenizer_name is not None:
        return load_tokenizer(corpus.tokenizer_name)
    if interrupted is not None and (interrupted / "tokenizer.json").exists():
        return load_tokenizer(interrupted)
    return _train_tokenizer(corpus, train, held_out)


def _prepare(
    settings: PrepareSettings,
    train: list[Path],
    validation: list[Path],
    held_out: HeldOut,
    tokenizer: Tokenizer,
    folder: Path,
) -> None:
    """Prepare the training and validation files in a locked folder."""
    corpus = settings.corpus
    tokenizer_digest = tokenizer_hash(tokenizer)
    files = [(path, held_out) for path in train] + [(path, HeldOut.share(100)) for path in validation]
    sources = [Source(path, rule, corpus.text_column, tokenizer_digest) for path, rule in files]
    if settings.part is not None:
        first, step = map(int, settings.part.split("/"))
        sources = sources[first - 1 :: step]
    unfinished = [source for source in sources if not source.is_finished(folder)]
    if settings.merge and unfinished:
        raise ValueError(
            f"{len(unfinished)} of {len(sources)} files are not finished, such as {unfinished[0].path}: pass --merge "
            "when the runs with --part are finished"
        )
    _prepare_sources(unfinished, tokenizer, folder, corpus.processes or os.cpu_count() or 1)
    if settings.part is None:
        for split in SPLITS:
            names = [source.name for source in sources]
            size = tokenizer.get_vocab_size()
            write_manifest(folder / split, names, vocab_size=size, tokenizer_hash=tokenizer_digest)
        _summarise(folder, sources)


def _require_text(files: list[Path], text_column: str) -> None:
    """Raise ValueError if none of the files has a document."""
    if not any(True for _ in _documents(files, text_column)):
        shown = ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more files" if len(files) > 3 else "")
        raise ValueError(f"there is no text in {shown}")


def _documents(files: list[Path], text_column: str) -> Iterator[list[str]]:
    return (document for path in files for document in read_documents(path, text_column))


def _summarise(folder: Path, sources: list[Source]) -> None:
    """Log the size of both splits, and warn of files without text."""
    manifests = [json.loads((folder / split / "manifest.json").read_text(encoding="utf-8")) for split in SPLITS]
    documents = [
        sum(part["documents"] for part in parts) for parts in zip(*(m["parts"] for m in manifests), strict=True)
    ]
    empty = [source.path for source, count in zip(sources, documents, strict=True) if not count]
    if empty:
        logger.warning("%d of %d files hold no text and are left out, such as %s", len(empty), len(sources), empty[0])
    train, validation = (
        ", ".join(counted(manifest[f"{noun}s"], noun) for noun in ("document", "sentence", "token"))
        for manifest in manifests
    )
    logger.info("text: %s", train)
    if manifests[1]["documents"]:
        logger.info("held out for validation: %s", validation)
    logger.info("vocabulary: %s tokens", f"{manifests[0]['vocab_size']:,}")
    if not manifests[0]["documents"]:
        raise ValueError("no document is left for training: use more text or lower --validation-split-percentage")


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

    documents = read_documents(source.path, source.text_column, advance)
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


def _training_files(corpus: CorpusSettings, folder: Path, copy: Path) -> list[Path]:
    """Return the training files; docstrings are first written to a file in `folder`, standard input to `copy`."""
    if not corpus.train_file:
        return find_files([gather_docstrings(folder / "docstrings.jsonl", corpus.processes or os.cpu_count() or 1)])
    if "-" in corpus.train_file:
        with copy.open("wb") as file:
            shutil.copyfileobj(standard_input(), file)
    return find_files([copy if name == "-" else name for name in corpus.train_file])


def _train_tokenizer(corpus: CorpusSettings, files: list[Path], held_out: HeldOut) -> Tokenizer:
    """Train a vocabulary on the training text of `files`."""

    def texts() -> Iterator[str]:
        for path in tqdm(files, desc="vocabulary", unit="file"):
            budget = MAX_VOCABULARY_CHARACTERS // len(files)
            for document in read_documents(path, corpus.text_column):
                if not held_out.holds(document):
                    yield from held_out.divide(document)[0] if held_out.is_divided(document) else document
                    budget -= sum(map(len, document))
                if budget < 0:
                    break

    return train_tokenizer(
        texts(),
        corpus.vocab_size,
        cased=corpus.cased,
        kind=corpus.tokenizer_type or "wordpiece",
        bert_special_tokens=corpus.bert_special_tokens,
    )


def _prepare_sources(sources: list[Source], tokenizer: Tokenizer, folder: Path, processes: int) -> None:
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
