"""`bertfast prepare`: tokenize text into a folder with a tokenizer and the shards of `train` and `validation`.

Each file of the corpus becomes one part of each split, independently of other files: in any order, in several processes
or on several machines (`--part`). All is built next to the contents that the folder has, and replaces them at the end.
An interrupted run continues; a folder of another corpus is refused.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock
from tokenizers import Tokenizer
from tqdm import tqdm

from bertfast.data.corpus import find_files, read_documents
from bertfast.data.docstrings import gather_docstrings
from bertfast.data.held_out import HeldOut
from bertfast.data.parts import SPLITS, Source, prepare_files
from bertfast.data.prepare_settings import CorpusSettings, PrepareSettings
from bertfast.data.shards import read_manifest, write_manifest
from bertfast.data.text_files import copy_stream, is_stream, named_stream
from bertfast.data.tokenizer import (
    load_tokenizer,
    require_all_ids,
    save_tokenizer,
    tokenizer_files,
    tokenizer_hash,
    train_tokenizer,
)
from bertfast.runtime.atomic_write import CannotWriteError, named_in_errors, remove
from bertfast.runtime.output_folder import (
    LOCK,
    RECORD,
    UNFINISHED,
    Origin,
    locked_folder,
    require_command,
    staged_contents,
)
from bertfast.runtime.settings import counted

__all__ = ["SPLITS", "CorpusSettings", "PrepareSettings", "prepare"]

logger = logging.getLogger("bertfast")

TOKENIZER = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
STANDARD_INPUT_COPY, DOCSTRINGS = "standard-input.txt", "docstrings.jsonl"
_CONTENTS = (*SPLITS, *TOKENIZER, STANDARD_INPUT_COPY, DOCSTRINGS)
_GATHERED = ".gathered"  # folder of a text that is gathered, until all checks are done
# Characters to train a vocabulary on, divided equally among the files; more text hardly changes the vocabulary.
MAX_VOCABULARY_CHARACTERS = 300_000_000


def prepare(settings: PrepareSettings) -> Path:
    """Write a tokenizer and the shards of both splits.

    With `settings.part`, only that part of the files is processed, and a last run with `merge` completes the folder.

    Returns:
        The folder. `Shards.open` opens its subfolders `train` and `validation`; the latter may have no documents.

    Raises:
        ValueError: The settings contradict each other, a file cannot be read, there is too little text, or the folder
            is in use.
        OriginError: The folder has shards of other text or other settings, finished or not.
        CannotWriteError: The folder cannot be written, as when the disk is full: then it is as it was before.
    """
    corpus, folder = settings.corpus, Path(settings.output_dir)
    lock = LOCK if settings.part is None else f"{LOCK}-{settings.part.replace('/', '-of-')}"
    copies = [folder.resolve() / parent / STANDARD_INPUT_COPY for parent in (_GATHERED, UNFINISHED, "")]
    stream = _stream(corpus)
    with locked_folder(folder, lock), named_stream(stream or "-", *copies), ExitStack() as stack:
        require_command(folder, "prepare")
        gathered = stack.enter_context(_gathered_text(corpus, stream, folder.resolve()))
        train = find_files([str(gathered) if name in (stream, "-") else name for name in corpus.train_file or ["-"]])
        validation = find_files(corpus.validation_file)
        if both := set(train) & set(validation):
            raise ValueError(f"{min(both)} is both in --train-file and in --validation-file")
        origin = _origin(corpus, train, validation)
        for files in filter(None, (train, validation)):
            _require_text(files, corpus.text_column)
        percentage = 0 if validation else corpus.validation_split_percentage
        held_out = HeldOut.of_corpus(percentage, lambda: _documents(train, corpus.text_column))
        with _beginning(settings, folder):
            building = stack.enter_context(_built(settings, folder, origin))
            if gathered is not None:
                now = building.resolve() / gathered.name
                os.replace(gathered, now)
                train = [now if path == gathered else path for path in train]
            tokenizer = _tokenizer(settings, train, held_out)
            save_tokenizer(tokenizer, building)
        rules = [(path, held_out) for path in train] + [(path, HeldOut.share(100)) for path in validation]
        key = tokenizer_hash(tokenizer)
        with named_in_errors(folder):
            _prepare(settings, [_source(path, rule, settings, key) for path, rule in rules], tokenizer)
    return folder


def _beginning(settings: PrepareSettings, folder: Path) -> AbstractContextManager[object]:
    """Return a context that keeps others out while a run begins: machines with different parts may start together."""
    return nullcontext() if settings.part is None else FileLock(folder / f"{LOCK}-tokenizer")


def _stream(corpus: CorpusSettings) -> str | None:
    """Return which of the texts can be read only once, and is copied; None: none of them.

    Raises:
        ValueError: There are several.
    """
    streams = [*dict.fromkeys(filter(is_stream, corpus.train_file))]
    if len(streams) > 1:
        raise ValueError(f"--train-file has several texts that can be read only once, {', '.join(streams)}: give one")
    return streams[0] if streams else None


@contextmanager
def _gathered_text(corpus: CorpusSettings, stream: str | None, folder: Path) -> Iterator[Path | None]:
    """Yield a file with the text that is not in files: of a stream, or the docstrings; None: there is no such text.

    It is removed at the end if it was not moved. Docstrings that an earlier run has gathered are used again.
    """
    scratch = folder / _GATHERED
    try:
        if not corpus.train_file:
            path = scratch / DOCSTRINGS
            with named_in_errors(folder):
                scratch.mkdir(exist_ok=True)
                earlier = [parent / DOCSTRINGS for parent in (folder / UNFINISHED, folder)]
                for found in [file for file in earlier if file.exists()][:1]:
                    _link(found, path)
            yield gather_docstrings(path, corpus.processes or os.cpu_count() or 1)
        elif stream is not None:
            path = scratch / STANDARD_INPUT_COPY
            copy_stream(stream, path)
            yield path
        else:
            yield None
    finally:
        remove(scratch)


@contextmanager
def _built(settings: PrepareSettings, folder: Path, origin: Origin) -> Iterator[Path]:
    """Yield the folder in which a run builds, see `staged_contents`; parts of files that are unchanged are kept."""

    def keeps(error: BaseException) -> bool:
        if settings.part is not None or not isinstance(error, Exception):  # other machines go on, or it was interrupted
            return True
        building = folder / UNFINISHED
        return not isinstance(error, CannotWriteError) and any(building.glob("*/[!.]*/part.json"))

    def reset(building: Path) -> None:
        for name in {*_CONTENTS, RECORD} - {*SPLITS}:
            remove(building / name)

    overwrite, completes = settings.overwrite_output_dir, settings.part is None
    with staged_contents(
        folder, origin, _CONTENTS, keeps=keeps, reset=reset, overwrite=overwrite, completes=completes
    ) as building:
        yield building


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
    consequences = {}
    if corpus.tokenizer_name is None:
        text = ("--train-file", "--text-column", "--validation-split-percentage")
        consequences["the tokenizer, which is trained on the text, would be another"] = text
    return Origin(inputs, values, "prepare", consequences)


def _tokenizer(settings: PrepareSettings, train: list[Path], held_out: HeldOut) -> Tokenizer:
    """Return the tokenizer to use; one that an earlier or interrupted run of the same origin has trained is kept.

    Args:
        settings: Settings of the run.
        train: Training files.
        held_out: Which part of them is held out.
    """
    corpus, folder = settings.corpus, Path(settings.output_dir)
    if corpus.tokenizer_name is not None:
        return load_tokenizer(corpus.tokenizer_name)
    for parent in (folder / UNFINISHED, *([] if settings.overwrite_output_dir else [folder])):
        if (parent / "tokenizer.json").exists():
            return load_tokenizer(parent)
    return _train_tokenizer(corpus, train, held_out)


def _source(path: Path, held_out: HeldOut, settings: PrepareSettings, tokenizer_hash: str) -> Source:
    """Return a file of the corpus; one that is being built will be moved into the output folder."""
    folder = Path(settings.output_dir).resolve()
    is_built = path.parent == folder / UNFINISHED
    final, now = (folder / path.name, path) if is_built else (path, None)
    return Source(final, held_out, settings.corpus.text_column, tokenizer_hash, now)


def _prepare(settings: PrepareSettings, sources: list[Source], tokenizer: Tokenizer) -> None:
    """Prepare the training and validation files in a locked folder."""
    folder = Path(settings.output_dir)
    building = folder / UNFINISHED
    if settings.part is not None:
        first, step = map(int, settings.part.split("/"))
        sources = sources[first - 1 :: step]
    finished = {source.name for source in sources if source.is_finished(folder)}
    if settings.part is None and not settings.overwrite_output_dir and _is_complete(folder, sources, finished):
        _summarise(folder, sources)
        remove(building)  # nothing is to be replaced
        return
    unfinished = []
    for source in sources:
        if source.name in finished:
            _reuse(source, folder, building)
        elif not source.is_finished(building):
            unfinished.append(source)
    if settings.merge and unfinished:
        raise ValueError(
            f"{len(unfinished)} of {len(sources)} files are not finished, such as {unfinished[0].path}: pass --merge "
            "when the runs with --part are finished"
        )
    prepare_files(unfinished, tokenizer, building, settings.corpus.processes or os.cpu_count() or 1)
    if settings.part is not None:
        return
    names = [source.name for source in sources]
    for split in SPLITS:
        for path in (building / split).iterdir():
            if path.name not in names:  # a part of a file that is no longer in the corpus
                remove(path)
        size, key = tokenizer.get_vocab_size(), sources[0].tokenizer_hash
        write_manifest(building / split, names, vocab_size=size, tokenizer_hash=key)
    if not _summarise(building, sources):
        remove(building)
        raise ValueError("no document is left for training: use more text or lower --validation-split-percentage")


def _reuse(source: Source, folder: Path, building: Path) -> None:
    """Take over the finished parts of a file from the contents that are to be replaced."""
    for split in SPLITS:
        target = building / split / source.name
        remove(target)
        shutil.copytree(folder / split / source.name, target, copy_function=_link)


def _is_complete(folder: Path, sources: Sequence[Source], finished: set[str]) -> bool:
    """Return whether a folder has a tokenizer, the parts of all sources, and manifests of them."""
    names = [source.name for source in sources]
    if finished != {*names} or not (folder / "tokenizer.json").is_file():
        return False
    with suppress(OSError, ValueError, KeyError, TypeError):
        manifests = [read_manifest(folder / split) for split in SPLITS]
        return all(
            manifest["tokenizer_hash"] == sources[0].tokenizer_hash
            and [part["name"] for part in manifest["parts"]] == names
            for manifest in manifests
        )
    return False


def _link(source: str | Path, target: str | Path) -> None:
    """Link a file, which takes no space, or copy it with its time if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _require_text(files: list[Path], text_column: str) -> None:
    """Raise ValueError if none of the files has a document."""
    if not any(True for _ in _documents(files, text_column)):
        shown = ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more files" if len(files) > 3 else "")
        raise ValueError(f"there is no text in {shown}")


def _documents(files: list[Path], text_column: str) -> Iterator[list[str]]:
    return (document for path in files for document in read_documents(path, text_column))


def _summarise(folder: Path, sources: list[Source]) -> int:
    """Log the size of both splits, warn of files without text, and return the number of training documents."""
    manifests = [read_manifest(folder / split) for split in SPLITS]
    documents = [
        sum(part["documents"] for part in parts) for parts in zip(*(m["parts"] for m in manifests), strict=True)
    ]
    empty = [source.path for source, count in zip(sources, documents, strict=True) if not count]
    if empty:
        logger.warning("%d of %d files hold no text and are left out, such as %s", len(empty), len(sources), empty[0])
    train, validation = (
        f"{counted(x['documents'], 'document')}, {counted(x['sentences'], 'sentence')}, {counted(x['tokens'], 'token')}"
        for x in manifests
    )
    logger.info("text: %s", train)
    if manifests[1]["documents"]:
        logger.info("held out for validation: %s", validation)
    logger.info("vocabulary: %s tokens", f"{manifests[0]['vocab_size']:,}")
    return manifests[0]["documents"]


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

    tokenizer = train_tokenizer(
        texts(),
        corpus.vocab_size,
        cased=corpus.cased,
        kind=corpus.tokenizer_type or "wordpiece",
        bert_special_tokens=corpus.bert_special_tokens,
    )
    require_all_ids(tokenizer, "the trained vocabulary")
    return tokenizer
