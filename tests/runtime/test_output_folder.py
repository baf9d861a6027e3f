"""What a folder was made from is recorded and compared, and only one process writes to it."""

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from bertfast.architectures.presets import preset_config
from bertfast.data.tokenizer import SPECIAL_TOKENS, save_tokenizer
from bertfast.models.bert import BertModel
from bertfast.models.files import save
from bertfast.runtime.atomic_write import CannotWriteError, atomic_path, named_in_errors, write_atomically
from bertfast.runtime.output_folder import (
    UNFINISHED,
    Origin,
    OriginError,
    check_contents,
    differences_from,
    locked_folder,
    output_folder,
    require_origin,
    staged_contents,
)
from bertfast.runtime.tensor_file import write_tensors

PARTS = ("part-*",)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one line\n")
    return path


@pytest.fixture
def written(tmp_path, text):
    """A folder with one part, and the origin of it."""
    origin = Origin({"--input-file": [text]}, {"--pooling": "mean", "--layers": [1, 2]})
    with output_folder(tmp_path / "out", origin, PARTS) as folder:
        (folder / "part-0").write_text("0")
    return folder, origin


def reopen(folder: Path, origin: Origin, **options) -> list[str]:
    """Open a folder again, and return the names of its parts."""
    with output_folder(folder, origin, PARTS, **options):
        return sorted(path.name for path in folder.glob("part-*"))


def test_the_same_origin_continues(written):
    assert reopen(*written) == ["part-0"]


def test_a_touched_or_moved_input_of_equal_contents_continues(written, text):
    folder, origin = written
    os.utime(text, ns=(1, 1))
    assert reopen(folder, origin) == ["part-0"]
    moved = text.rename(text.with_name("moved.txt"))
    assert reopen(folder, Origin({"--input-file": [moved]}, origin.settings)) == ["part-0"]


def test_other_contents_are_refused_with_both_values(written, text):
    folder, origin = written
    text.write_text("another line\n")
    with pytest.raises(
        ValueError, match=r"--input-file was .*\(9 bytes, SHA-256 .* and is .*\(13 bytes, .*--overwrite"
    ):
        reopen(folder, origin)
    assert (folder / "part-0").read_text() == "0"


def test_of_many_inputs_those_that_differ_are_named(tmp_path):
    files = [tmp_path / f"{number}.txt" for number in range(5)]
    for path in files:
        path.write_text(path.name)
    folder = tmp_path / "out"
    with output_folder(folder, Origin({"--input-file": files}), PARTS):
        (folder / "part-0").write_text("0")
    files[3].write_text("changed")
    expected = r"was .*/3.txt \(5 .*, next to 4 unchanged and is .*/3.txt \(7 .*, next to 4 unchanged"
    with pytest.raises(ValueError, match=expected):
        reopen(folder, Origin({"--input-file": files}))
    files[3].write_text("3.txt")
    with pytest.raises(ValueError, match=r"was .*/1.txt .*, next to 4 unchanged and is absent, next to 4 unchanged"):
        reopen(folder, Origin({"--input-file": [files[0], *files[2:]]}))
    with pytest.raises(ValueError, match=r"was .*0.txt .* 3 more and is .*1.txt .* 3 more"):
        reopen(folder, Origin({"--input-file": [*files[1:], files[0]]}))


def test_contents_of_equal_size_and_another_time_are_refused(written, text):
    folder, origin = written
    text.write_text("one lime\n")
    os.utime(text, ns=(1, 1))
    with pytest.raises(ValueError, match="--input-file was"):
        reopen(folder, origin)


@pytest.mark.parametrize("settings", [{"--pooling": "cls", "--layers": [1, 2]}, {"--pooling": "mean"}])
def test_other_settings_are_refused(written, settings):
    folder, origin = written
    with pytest.raises(ValueError, match=r'--pooling was "mean" and is "cls"|--layers was \[1, 2\] and is null'):
        reopen(folder, Origin(origin.inputs, settings))


def test_a_missing_or_added_input_is_refused(written, tmp_path):
    folder, origin = written
    other = tmp_path / "other.txt"
    other.write_text("")
    inputs = {"--input-file": [*origin.inputs["--input-file"], other]}
    with pytest.raises(ValueError, match=r"--input-file was"):
        reopen(folder, Origin(inputs, origin.settings))
    with pytest.raises(ValueError, match=r"--input-file was .* and is absent"):
        reopen(folder, Origin({}, origin.settings))


@pytest.mark.parametrize("record", [None, "{", "[]", "[" * 100_000, '{"inputs": 3}', "null"])
def test_contents_without_a_readable_record_are_refused(written, record):
    folder, origin = written
    (folder / "origin.json").unlink() if record is None else (folder / "origin.json").write_text(record)
    with pytest.raises(ValueError, match="without a record"):
        reopen(folder, origin)


def test_a_damaged_record_is_refused_without_contents_too(written):
    folder, origin = written
    (folder / "part-0").unlink()
    (folder / "origin.json").write_text("{")
    with pytest.raises(ValueError, match=r"origin\.json is damaged"):
        reopen(folder, origin)
    assert reopen(folder, origin, overwrite=True) == []


def test_overwriting_removes_the_contents_and_nothing_else(written):
    folder, origin = written
    (folder / "notes.txt").write_text("a user's file")
    assert reopen(folder, Origin(origin.inputs, {"--pooling": "cls"}), overwrite=True) == []
    assert (folder / "notes.txt").exists()
    assert json.loads((folder / "origin.json").read_text())["settings"] == {"--pooling": "cls"}


def test_a_folder_without_contents_takes_any_origin(written):
    folder, origin = written
    (folder / "part-0").unlink()
    assert reopen(folder, Origin(origin.inputs, {"--pooling": "cls"})) == []


HOLD = """
import sys, time
from pathlib import Path
from bertfast.runtime.output_folder import Origin, output_folder
with output_folder(Path(sys.argv[1]), Origin(), ()):
    print("locked", flush=True)
    time.sleep(100)
"""


def test_a_living_owner_keeps_others_out_and_a_dead_one_does_not(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout.readline() == "locked\n"
            with pytest.raises(ValueError, match=f"in use by process {owner.pid} on "):
                reopen(tmp_path, Origin())
        finally:
            owner.send_signal(signal.SIGKILL)
    assert reopen(tmp_path, Origin()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folder_of_another_command_is_refused_and_left_as_it_is(overwrite, tmp_path):
    folder = tmp_path / "out"
    with output_folder(folder, Origin(command="prepare"), ("train",)):
        (folder / "train").mkdir()
    before = (folder / "origin.json").read_text()
    with pytest.raises(ValueError, match=r"out belongs to `bertfast prepare`: choose another --output-dir, or delete"):
        reopen(folder, Origin(command="embed"), overwrite=overwrite)
    assert (folder / "train").is_dir()
    assert (folder / "origin.json").read_text() == before


def test_a_run_that_cannot_continue_refuses_contents_of_the_same_origin(written):
    with pytest.raises(OriginError, match="results of a run with the same inputs and settings: choose"):
        check_contents(*written, PARTS, continues=False)


def test_old_contents_stay_until_the_run_begins(written):
    folder, origin = written
    begin = check_contents(folder, origin, PARTS, overwrite=True, continues=False)
    assert (folder / "part-0").exists()
    begin()
    assert not (folder / "part-0").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link", "linked folder"])
def test_an_input_is_never_replaced(kind, tmp_path):
    folder = tmp_path / "out"
    part = folder / ("part-0/text.txt" if kind == "folder" else "part-0")
    part.parent.mkdir(parents=True)
    part.write_text("text")
    source = part
    if kind == "link":
        source = tmp_path / "link"
        source.symlink_to(part)
    elif kind == "linked folder":
        (tmp_path / "link").symlink_to(folder)
        source = tmp_path / "link" / "part-0"
    with pytest.raises(ValueError, match=f"--input-file reads {source}, which would be replaced"):
        reopen(folder, Origin({"--input-file": [source]}), overwrite=True)
    assert part.read_text() == "text"


def test_a_finished_run_is_compared_in_what_is_known_of_it(written):
    folder, origin = written
    require_origin(folder, Origin(origin.inputs, {"--pooling": "mean"}))
    with pytest.raises(OriginError, match='--pooling was "mean" and is "cls"'):
        require_origin(folder, Origin(origin.inputs, {"--pooling": "cls"}))
    (folder / "origin.json").unlink()
    with pytest.raises(OriginError, match="without a record"):
        require_origin(folder, origin)


@pytest.fixture
def small_disk():
    """A disk on which no file gets larger than 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("kind", ["text", "tensors", "model", "tokenizer"])
def test_a_full_disk_leaves_what_was_saved_before(kind, tmp_path):
    def write(size: int) -> None:
        if kind == "text":
            write_atomically(tmp_path / "text", "x" * size)
        elif kind == "tensors":
            with atomic_path(tmp_path / "tensors") as temporary:
                write_tensors({"x": torch.zeros(size)}, temporary)
        elif kind == "model":
            save(BertModel(preset_config("tiny", vocab_size=64 + size, hidden_size=2)), tmp_path)
        else:
            vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *map(str, range(size))])}
            save_tokenizer(Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")), tmp_path)

    write(10)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match=rf"^{tmp_path}.* (cannot|could not) be written"):
        write(100_000)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"^{tmp_path}/file/out cannot be written: Not a directory"):
        reopen(tmp_path / "file" / "out", Origin())


def write_half(path: Path) -> None:
    with path.open("w") as file:
        file.write("half")
        json.dump(object(), file)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "scores.json"
    write_atomically(path, "old")
    with pytest.raises(TypeError), atomic_path(path) as temporary:
        write_half(temporary)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_replaces_a_folder(tmp_path):
    path = tmp_path / "model"
    for text in ("old", "new"):
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert [file.name for file in path.iterdir()] == ["new"]


def test_files_get_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", "")
        write_tensors({"x": torch.zeros(1)}, tmp_path / "tensors")
        save(BertModel(preset_config("tiny", vocab_size=64, hidden_size=2)), tmp_path / "model")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def build(folder: Path, origin: Origin, content: str | BaseException, *, keep: bool = True, **options) -> None:
    """Build part-0 with this content, or fail after it was begun."""
    with (
        locked_folder(folder),
        staged_contents(folder, origin, PARTS, keeps=lambda error: keep, **options) as building,
    ):
        (building / "part-0").write_text(content if isinstance(content, str) else "half")
        if isinstance(content, BaseException):
            raise content


def test_contents_that_are_built_replace_the_old_ones_at_the_end(written):
    folder, origin = written
    (folder / "part-1").write_text("1")
    (folder / "notes.txt").write_text("a user's file")
    other = Origin(origin.inputs, {"--pooling": "cls"})
    with pytest.raises(OriginError, match="--pooling was"):
        build(folder, other, "new")
    assert (folder / "part-0").read_text() == "0"
    build(folder, other, "new", overwrite=True)
    assert (folder / "part-0").read_text() == "new"
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") == [
        *([".lock"] if (folder / ".lock").exists() else []),
        "notes.txt",
        "origin.json",
        "part-0",
    ]
    assert json.loads((folder / "origin.json").read_text())["settings"] == {"--pooling": "cls"}


@pytest.mark.parametrize("keep", [False, True])
def test_what_was_built_until_an_error_is_kept_if_asked(keep, written):
    folder, origin = written
    before = (folder / "origin.json").read_text()
    other = Origin(origin.inputs, {"--pooling": "cls"})
    with pytest.raises(KeyError):
        build(folder, other, KeyError("x"), keep=keep, overwrite=True)
    assert ((folder / "part-0").read_text(), (folder / "origin.json").read_text()) == ("0", before)
    assert (folder / UNFINISHED / "part-0").exists() == keep


def test_contents_that_are_not_complete_replace_nothing(written):
    folder, origin = written
    build(folder, origin, "new", completes=False)
    assert (folder / "part-0").read_text() == "0"
    assert (folder / UNFINISHED / "part-0").read_text() == "new"


def test_what_follows_from_a_difference_is_named_with_it(written):
    folder, origin = written
    consequences = {"the vectors would be others": ["--pooling"], "the names would be others": ["--input-file"]}
    other = Origin(origin.inputs, {"--pooling": "cls", "--layers": [1, 2]}, "", consequences)
    with pytest.raises(OriginError, match='--pooling was "mean" and is "cls"; the vectors would be others: choose'):
        reopen(folder, other)


def test_only_what_an_origin_names_is_compared(written, tmp_path):
    folder, origin = written
    assert differences_from(folder, Origin({}, {"--pooling": "mean"})) == []
    assert differences_from(folder, Origin({}, {"--layers": "é"})) == ['--layers was [1, 2] and is "é"']
    assert differences_from(tmp_path / "nowhere", origin) == []


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EFBIG, "limits the size of files; raise"), (errno.ENOSPC, "free space"), (errno.EROFS, "another folder")],
)
def test_errors_of_writing_have_a_remedy(number, remedy, tmp_path):
    def fail():
        raise OSError(number, os.strerror(number))

    expected = f"a cannot be written: {os.strerror(number)}: .*{remedy}"
    with pytest.raises(CannotWriteError, match=expected), named_in_errors(tmp_path / "a"):
        fail()


def test_a_tensor_file_that_cannot_be_written_is_named_without_its_temporary_name(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        expected = rf"^{tmp_path}/a\.safetensors cannot be written: File too large: "
        with pytest.raises(CannotWriteError, match=expected), atomic_path(tmp_path / "a.safetensors") as temporary:
            write_tensors({"x": torch.zeros(1000)}, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [*tmp_path.iterdir()] == []
