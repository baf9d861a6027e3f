"""All file types give the same documents, and invalid input is refused with file and line."""

import bz2
import errno
import gzip
import json
import lzma
import os

import pytest

from bertfast.data import corpus, text_files
from bertfast.data.corpus import find_files, read_documents
from bertfast.data.sentences import split_sentences
from bertfast.data.text_files import COMPRESSIONS

DOCUMENTS = [["First title", "Its naïve paragraph."], ["Second, “quoted”."], ["Third.", "And more.", "Last."]]
TEXT = "\n\n".join("\n".join(document) for document in DOCUMENTS)
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
JSON_LINES = "\n".join(json.dumps({"id": i, "body": "\n".join(d)}) for i, d in enumerate(DOCUMENTS)) + "\n"


def compress(content: str, compression: str) -> bytes:
    if compression == ".zst":
        return pytest.importorskip("zstandard").compress(content.encode())
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[compression](content.encode())


def read(path, content, text_column="text"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_documents(path, text_column))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_text_and_json_lines_with_any_compression_give_the_same_documents(tmp_path, compression):
    assert read(tmp_path / f"a.txt{compression}", compress(TEXT, compression)) == DOCUMENTS
    assert read(tmp_path / f"a.jsonl{compression}", compress(JSON_LINES, compression), "body") == DOCUMENTS


def test_parquet_gives_the_same_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["\n".join(document) for document in DOCUMENTS]}), path)
    assert list(read_documents(path, "body")) == DOCUMENTS
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text' \(columns: body\); see --text-column"):
        list(read_documents(path))
    parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: column 'text' holds None"):
        list(read_documents(path))
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or not Parquet"):
        list(read_documents(path))


def test_line_endings_byte_order_mark_and_blank_lines_do_not_matter(tmp_path):
    content = "\ufeff\r\n\r\n" + TEXT.replace("\n", "\r\n").replace("\r\n\r\n", "\r\n \t\r\n\r\n") + "\r\n\r\n"
    assert read(tmp_path / "a.txt", content) == DOCUMENTS


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2", ".zst"])
def test_a_compression_is_recognised_by_content_despite_its_suffix(tmp_path, suffix, compression):
    assert read(tmp_path / f"a.txt{suffix}", compress(TEXT, compression)) == DOCUMENTS


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_lines_that_end_with_carriage_returns_are_split(tmp_path, compression, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK", 16)
    assert read(tmp_path / f"a.txt{compression}", compress(TEXT.replace("\n", "\r"), compression)) == DOCUMENTS


def test_a_carriage_return_within_a_line_does_not_split_it(tmp_path):
    assert read(tmp_path / "a.txt", "one\rtwo\nthree\n") == [["one\rtwo", "three"]]


def test_several_zstandard_frames_are_read_completely_and_truncation_is_detected(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(f"line {i} with {i * i} in it\n" for i in range(20_000))
    frames = zstandard.compress(lines.encode()) + zstandard.compress(b"more\n")
    [document] = read(tmp_path / "a.txt.zst", frames)
    assert document == [*lines.splitlines(), "more"]
    with pytest.raises(ValueError, match=r"a\.txt\.zst: cannot be read beyond line \d{4} \(the file is truncated\)"):
        read(tmp_path / "a.txt.zst", frames[: len(frames) // 2])


def test_progress_reaches_the_size_of_the_file(tmp_path):
    for name, compression in [("a.txt", ""), ("a.txt.xz", ".xz"), ("a.jsonl.gz", ".gz")]:
        path = tmp_path / name
        path.write_bytes(compress(JSON_LINES if "json" in name else TEXT, compression))
        positions = []
        list(read_documents(path, "body", positions.append))
        assert positions == sorted(positions)
        assert positions[-1] == path.stat().st_size


def test_a_very_long_document_is_split(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_CHARACTERS", 100)
    documents = read(tmp_path / "a.txt", "ten chars\n" * 100)
    assert sum(map(len, documents)) == 100
    assert max(map(len, documents)) <= 12


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\nbad \xff byte\n", r"a\.txt, line 2: not UTF-8 \(byte 0xff at column 5\)"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1: not an object"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"body": "x", "id": 1}\n',
            r"line 2: no text in a field 'text' \(fields: body, id\); see --text-column",
        ),
        ("a.jsonl", '{"text": null}\n', r"line 1: no text in a field 'text'"),
        ("a.jsonl", '{"text": "\\ud83d"}\n', r"line 1: unpaired surrogate \\ud83d, which is not a character"),
        ("a.txt.gz", gzip.compress(TEXT.encode() * 99)[:-20], r"a\.txt\.gz: cannot be read .*; copy or download it"),
        ("a.txt.xz", lzma.compress(TEXT.encode() * 99)[:-40], r"a\.txt\.xz: cannot be read .*; copy or download it"),
        ("a.txt", b"PAR1\0", r"a\.txt is a Parquet file; give it the suffix \.parquet"),
        ("a.txt", b"PK\x03\x04", r"a\.txt is a zip archive; unpack it"),
        ("a.txt", TEXT.encode("utf-16"), r"a\.txt is UTF-16; convert the file to UTF-8"),
        ("a.txt", b"a line\nan\0ther\n", r"a\.txt is not a text file: byte 9 is 0"),
        ("a.txt", LFS_POINTER, r"a\.txt is a Git LFS pointer, not the file itself; run git lfs pull"),
    ],
)
def test_invalid_input_is_refused_with_file_and_line(tmp_path, name, content, message):
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, content)


def test_folders_are_searched_recursively_in_a_fixed_order(tmp_path):
    for name in ("b/z.txt", "b/a.jsonl.gz", "a.txt.xz", "notes.md", "b/c/d.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in find_files([tmp_path, tmp_path / "a.txt.xz"])]
    assert found == ["a.txt.xz", "b/a.jsonl.gz", "b/c/d.parquet", "b/z.txt"]
    with pytest.raises(ValueError, match=r"notes\.md is of an unknown file type"):
        find_files([tmp_path / "notes.md"])
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*absent"):
        find_files([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no text"):
        find_files([tmp_path / "empty"])


def test_links_are_followed_and_loops_end(tmp_path):
    for name in ("folder/b.txt", "elsewhere/a.txt", "elsewhere/deeper/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder" / "loop").symlink_to(tmp_path / "folder")
    (tmp_path / "elsewhere" / "deeper" / "loop").symlink_to("..")
    (tmp_path / "folder" / "again.txt").symlink_to("b.txt")
    found = find_files([tmp_path / "folder"])
    assert sorted(path.name for path in found) == ["a.txt", "b.txt", "c.txt"]
    (tmp_path / "folder" / "dangling.txt").symlink_to("gone.txt")
    with pytest.raises(FileNotFoundError, match=r"dangling\.txt is a link to gone\.txt, which does not exist"):
        find_files([tmp_path / "folder"])


def test_hidden_files_and_outputs_of_runs_in_a_folder_are_left_out(tmp_path, caplog):
    for name in ("a.txt", "._a.txt", ".ipynb_checkpoints/a.txt", "shards/vocab.txt", "shards/origin.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_files([tmp_path]) == [tmp_path / "a.txt"]
    assert f"{tmp_path / 'shards'} is left out: it is the output of a run" in caplog.text
    assert find_files([tmp_path / "shards", tmp_path / "._a.txt"]) == [
        tmp_path / "shards" / "vocab.txt",
        tmp_path / "._a.txt",
    ]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()

    def scandir(path, original=os.scandir):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        find_files([tmp_path])


@pytest.mark.parametrize(
    "sentences",
    [
        ["Mr. Smith met Dr. J. R. Jones at 5 p.m. on Monday.", "They spoke."],
        ['"Where to?" he asked.', '"Home!"', "So they went."],
        ["Pi is 3.14 or so.", "See Fig. 2 and No. 7 of vol. 3.", "It was no.", "He left in 1990.", "Yes…", "No!?"],
        ["He lived at the U.S. Army base.", "She left the U.S.", "In 1990 she came back."],
        ["(It rained.)", "[It poured.]", "“It snowed.”", "1. The first item of a list."],
        ["no capital anywhere. not even here"],
        ["Acme Inc. Limited grew.", "Ärzte kamen.", "E.g. This, i.e. That."],
    ],
)
def test_paragraphs_are_split_at_sentence_ends(sentences):
    assert split_sentences("  ".join(sentences)) == sentences


def test_splitting_loses_no_word(shared_data):
    documents = read_documents(shared_data / "corpus" / "wikitext2-detok-test.txt.xz")
    paragraphs = [paragraph for document in documents for paragraph in document]
    split = [split_sentences(paragraph) for paragraph in paragraphs]
    assert [" ".join(sentences).split() for sentences in split] == [paragraph.split() for paragraph in paragraphs]
    lengths = sorted(len(sentence) for sentences in split for sentence in sentences)
    assert 80 < lengths[len(lengths) // 2] < 160


def test_a_named_pipe_is_no_corpus(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"a\.txt is a pipe, which can be read only once: write its text to a file"):
        find_files([tmp_path / "a.txt"])
