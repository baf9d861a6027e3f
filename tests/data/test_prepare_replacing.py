"""`bertfast prepare --overwrite-output-dir` builds next to the old shards, which stay until the new are complete."""

import os
import shutil
from pathlib import Path

import pytest

from bertfast.data import parts
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.shards import Shards
from bertfast.data.tokenizer import load_tokenizer
from bertfast.runtime.atomic_write import CannotWriteError, named_in_errors


@pytest.fixture
def texts(tmp_path) -> Path:
    """A folder with three files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abc":
        documents = (f"Document {name} {i}. It has a second line.\nAnd a third." for i in range(20))
        (folder / f"{name}.txt").write_text("\n\n".join(documents))
    return folder


@pytest.fixture
def run(tmp_path, texts):
    """Return a function that prepares the texts into tmp_path/out with one process."""

    def run(**options) -> Path:
        vocabulary = {} if "tokenizer_name" in options else {"vocab_size": 128}
        values = {"train_file": [str(texts)], "processes": 1} | vocabulary | options
        overwrite, output = values.pop("overwrite", False), values.pop("output", "out")
        corpus = CorpusSettings(**values)
        return prepare(PrepareSettings(str(tmp_path / output), corpus, overwrite_output_dir=overwrite))

    return run


def files_in(folder: Path) -> dict[str, bytes]:
    """Return all files but locks by name."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def failing(error: BaseException, name: str = "b.txt"):
    """Return a `prepare_file` that raises an error at one file."""

    def prepare_file(source, *rest, original=parts.prepare_file):
        if source.path.name == name:
            raise error
        original(source, *rest)

    return prepare_file


FULL = CannotWriteError("b.txt cannot be written: No space left on device")


def test_a_full_disk_leaves_nothing_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "prepare_file", failing(FULL))
    with pytest.raises(CannotWriteError):
        run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [FULL, ValueError("b.txt, line 2: not UTF-8"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_data_intact(error, run, texts, monkeypatch):
    folder = run()
    before = files_in(folder)
    (texts / "c.txt").write_text("Another text. It has two lines.\nThis is one of them.")
    with monkeypatch.context() as patch:
        (texts / "b.txt").write_text("Another text. It has two lines.\nThis is the other of them.")
        patch.setattr(parts, "prepare_file", failing(error, "c.txt"))
        with pytest.raises(type(error)):
            run(overwrite=True)
    after = files_in(folder)
    assert before == {name: content for name, content in after.items() if not name.startswith(".unfinished")}
    assert (before == after) == (error is FULL)
    key = load_tokenizer(folder).get_vocab_size()
    assert Shards.open(folder / "train").vocab_size == key  # the old data can be used
    run(overwrite=True)
    assert not (folder / ".unfinished").exists()
    assert files_in(folder) != before


def test_an_interrupted_replacement_continues_with_finished_parts(run, texts, monkeypatch):
    folder = run()
    (texts / "a.txt").write_text("Another text. It has two lines.\nThis is one of them.")
    with monkeypatch.context() as patch:
        patch.setattr(parts, "prepare_file", failing(KeyboardInterrupt(), "c.txt"))
        with pytest.raises(KeyboardInterrupt):
            run(overwrite=True)
    done = {
        path.parent.name: path.stat().st_mtime_ns for path in (folder / ".unfinished" / "train").glob("*/part.json")
    }
    assert {name[:5] for name in done} == {"a.txt", "b.txt"}
    monkeypatch.setattr("bertfast.data.prepare.train_tokenizer", None)  # it has been trained
    run(overwrite=True)
    times = {path.parent.name: path.stat().st_mtime_ns for path in (folder / "train").glob("*/part.json")}
    assert done.items() <= times.items()
    assert len(times) == 3


def test_the_result_does_not_depend_on_what_was_there_before(run, texts, tmp_path):
    (texts / "d.txt").write_text("A fourth text. It will be removed.\nThis is its end.")
    folder = run()
    (texts / "d.txt").unlink()
    run(overwrite=True)
    fresh = run(output="fresh")
    old, new = ({name: text for name, text in files_in(x).items() if "origin" not in name} for x in (folder, fresh))
    assert old == new  # without the part of the file that is gone


def test_an_unfinished_run_of_other_settings_is_refused_or_replaced(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(parts, "prepare_file", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run()
    with pytest.raises(ValueError, match="--cased was false and is true"):
        run(cased=True)
    folder = run(cased=True, overwrite=True)
    assert any(token.isupper() for token in load_tokenizer(folder).get_vocab() if token[0] != "[")


def test_an_unfinished_replacement_does_not_bar_the_data_that_is_there(run, texts, monkeypatch):
    folder = run()
    before = files_in(folder)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "prepare_file", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(cased=True, overwrite=True)
    assert files_in(folder) != before
    run()
    assert files_in(folder) == before


def test_a_run_that_is_killed_while_it_replaces_can_be_repeated(run, texts, monkeypatch):
    folder = run()
    old = files_in(folder)
    (texts / "a.txt").write_text("Another text. It has two lines.\nThis is one of them.")
    replace, moves = os.replace, iter(range(100))

    def killed(source, target):
        if (Path(source).parent, Path(target).parent) == (folder / ".unfinished", folder) and next(moves) == 1:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("bertfast.runtime.output_folder.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(overwrite=True)
    assert not (folder / "train").exists() or not (folder / "validation").exists()  # missing, but not mixed
    run(overwrite=True)
    assert not (folder / ".unfinished").exists()
    Shards.open(folder / "train").verify()
    assert files_in(folder).keys() != old.keys() or files_in(folder) != old


def test_the_same_command_changes_nothing(run):
    folder = run()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix}
    run()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix} == times


def test_parts_are_copied_where_there_are_no_links(run, texts, monkeypatch):
    def refused(source, target):
        raise OSError("no links")

    monkeypatch.setattr("bertfast.data.prepare.os.link", refused)
    folder = run()
    before = {path.parent: path.stat().st_mtime_ns for path in folder.rglob("part.json")}
    (texts / "a.txt").write_text("Another text. It has two lines.\nThis is one of them.")
    shutil.rmtree(folder / "train" / next(path.name for path in (folder / "train").glob("c.txt*")))
    run(tokenizer_name=str(folder / "tokenizer.json"), output="other")
    run(overwrite=True)
    after = {path.parent: path.stat().st_mtime_ns for path in folder.rglob("part.json")}
    assert len(after) == len(before) == 6


def test_an_error_of_writing_is_one_of_its_own(tmp_path):
    with pytest.raises(CannotWriteError, match="No space left on device"), named_in_errors(tmp_path / "a"):
        raise OSError(28, "No space left on device", str(tmp_path / "a"))
