"""Standard input is read like a file, in any locale, and errors name the line."""

import gzip
import os
import threading
import tracemalloc

import pytest

from bertfast.data import text_files
from bertfast.data.text_files import (
    STANDARD_INPUT,
    json_object,
    read_json_list,
    read_lines,
    read_standard_input,
    read_text,
)


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("é\n\n b ".encode(), ["é\n", "\n", " b "]),
        (b"\xef\xbb\xbfa\r\nb\r\n", ["a\r\n", "b\r\n"]),
        (b"a\rb\r", ["a\r", "b\r"]),
        (b"a\r\nb\nc\rd\n", ["a\r\n", "b\n", "c\rd\n"]),
        (b"a\r" * 9000 + b"b\r\nc\nd", ["a\r"] * 9000 + ["b\r\n", "c\n", "d"]),
        (gzip.compress(b"a\nb\n"), ["a\n", "b\n"]),
        (b"", []),
    ],
)
def test_lines_have_numbers_with_any_line_ends_and_locale(content, lines, pipe):
    pipe(content)
    assert list(read_standard_input()) == list(enumerate(lines, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\ncaf\xe9\n", r"standard input, line 3: not UTF-8 \(byte 0xe9 at column 4\); convert the text to UTF-8"),
        (b"a\0b\n", "standard input is not a text file: byte 1 is 0"),
        ("a\n".encode("utf-16"), "standard input is UTF-16; convert the file to UTF-8"),
        (gzip.compress(b"a\n" * 99)[:-9], "standard input: cannot be read"),
    ],
)
def test_input_that_is_not_text_is_refused_with_its_line(content, message, pipe):
    pipe(content)
    with pytest.raises(ValueError, match=message):
        list(read_standard_input())


def test_closed_standard_input_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match=r"standard input is closed: pipe text into the command, or give a file"):
        next(read_standard_input())


def test_a_line_end_that_arrives_in_two_pieces_ends_one_line(monkeypatch):
    reader, writer = os.pipe()
    os.write(writer, b"a\r")
    with os.fdopen(reader, encoding="ascii") as standard_input:
        monkeypatch.setattr("sys.stdin", standard_input)
        lines = read_standard_input()
        threading.Timer(0.05, lambda: (os.write(writer, b"\nb\r\n"), os.close(writer))).start()
        assert list(lines) == [(1, "a\r\n"), (2, "b\r\n")]


def test_an_unpaired_surrogate_is_refused_with_its_line():
    with pytest.raises(ValueError, match=r"standard input, line 7: unpaired surrogate \\ud800"):
        json_object(f"{STANDARD_INPUT}, line 7", '{"a": "\\ud800"}', "{}")


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_line_ends_are_found_wherever_blocks_end(block, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK", block)
    content = b"a\rb\r\n\rccccccc\n\n\r\r\nd\r"
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    # The first block that is read decides how: it has a carriage return and no line feed.
    with path.open("rb", buffering=4) as file:
        assert [*text_files._lines("a.txt", file)] == content.splitlines(keepends=True)


def test_a_carriage_return_ends_a_line_of_formats_that_cannot_contain_one(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"a\r\nb\nc\rd\r\r\n")
    assert [line for _, line in read_lines(path, universal=True)] == ["a\r\n", "b\n", "c\r", "d\r", "\r\n"]


def test_a_list_in_json_is_read_value_by_value(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b' \r[ {"a":\r\n [1, "]"]} ,\r"b\\n"\n, 3 ]\n')
    assert [*read_json_list(path)] == [(1, '{"a":\n [1, "]"]}'), (2, '"b\\n"'), (3, "3")]


def test_a_file_that_is_read_at_once_has_a_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" + " " * 100)
    with pytest.raises(ValueError, match=r"a\.json has more than 50 characters"):
        read_text(path, limit=50)


def test_the_column_of_a_string_without_end_is_said_once():
    with pytest.raises(ValueError, match=r"line 3: not JSON \(Unterminated string starting at column 7\)"):
        json_object("a, line 3", '{"a": "b}', "{}")


@pytest.mark.parametrize("start", [b"a", b"a\rb"], ids=["line feeds", "carriage returns"])
def test_a_line_without_end_is_refused_before_it_is_in_memory(start, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(gzip.compress(start + b" " * 50_000_000))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.json has a line of more than 400,000 bytes: it is damaged, or not text"):
        read_text(path, limit=100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_a_named_pipe_is_read(tmp_path):
    path = tmp_path / "a.txt"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("a\nb\n",))
    writer.start()
    positions: list[int] = []
    assert [*read_lines(path, positions.append)] == [(1, "a\n"), (2, "b\n")]
    writer.join()
    assert positions == [0, 0]
