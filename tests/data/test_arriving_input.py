"""Lines of standard input are read when they have arrived, in large groups if they arrive fast."""

import gzip
import os
import threading
import time

import pytest

from bertfast.data import text_files
from bertfast.data.text_files import read_arriving_lines


@pytest.fixture
def writer(monkeypatch):
    """Make a pipe standard input, and return the descriptor to write to."""
    reader, writer = os.pipe()
    with os.fdopen(reader, encoding="ascii") as standard_input:
        monkeypatch.setattr("sys.stdin", standard_input)
        yield writer


@pytest.fixture
def patience(monkeypatch):
    """Have a line wait long for others, so that what the tests write at once arrives at once."""
    monkeypatch.setattr(text_files, "_PATIENCE", 1.0)


def write_all(writer: int, content: bytes) -> threading.Thread:
    """Write in another thread, as a pipe holds 64 KB, and end the input."""

    def write() -> None:
        with os.fdopen(writer, "wb") as file:
            file.write(content)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_a_line_is_read_while_the_writer_waits_for_the_answer(writer):
    groups = read_arriving_lines(1000)
    for number in range(1, 4):
        os.write(writer, b"a text\n")
        assert next(groups) == [(number, "a text\n")]
    os.write(writer, b"b\r\nc\nthe first half, ")
    assert next(groups) == [(4, "b\r\n"), (5, "c\n")]  # not held back by the line that has begun
    os.write(writer, b"the second\nd")
    os.close(writer)
    assert [*groups] == [[(6, "the first half, the second\n"), (7, "d")]]


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("packed", [bytes, gzip.compress], ids=["plain", "compressed"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_lines_in_plenty_are_read_in_full_groups(end, packed, writer):
    lines = [b"%d" % n * (n % 7) + end for n in range(50_000)]
    thread = write_all(writer, packed(b"".join(lines)))
    groups = [*read_arriving_lines(512)]
    thread.join()
    assert {len(group) for group in groups[:-1]} == {512}
    assert [line for group in groups for line in group] == [*enumerate(map(bytes.decode, lines), 1)]


@pytest.mark.usefixtures("patience")
def test_a_line_longer_than_a_pipe_arrives_whole(writer):
    lines = [b"a" * 300_000 + b"\n", b"b\n", b"c" * 100_000]
    thread = write_all(writer, b"".join(lines))
    assert [line for group in read_arriving_lines(2) for _, line in group] == [*map(bytes.decode, lines)]
    thread.join()


def test_the_first_group_may_have_a_least_size(writer):
    groups = read_arriving_lines(1000, least=3)
    threading.Timer(0.3, os.write, (writer, b"c\nd\n")).start()
    os.write(writer, b"a\nb\n")
    assert [line for _, line in next(groups)][:3] == ["a\n", "b\n", "c\n"]
    os.close(writer)
    assert sum(map(len, groups)) <= 1


def test_input_that_ends_early_is_one_group(writer):
    os.write(writer, b"a\nb\n")
    os.close(writer)
    assert [*read_arriving_lines(1000, least=32)] == [[(1, "a\n"), (2, "b\n")]]


def test_empty_input_has_no_group(writer):
    os.close(writer)
    assert [*read_arriving_lines(1000)] == []


def test_a_line_waits_no_longer_than_its_patience(writer, monkeypatch):
    monkeypatch.setattr(text_files, "_PATIENCE", 0.2)
    done = threading.Event()

    def write() -> None:
        while not done.wait(0.05):
            os.write(writer, b"a\n")

    thread = threading.Thread(target=write)
    thread.start()
    started = time.monotonic()
    group = next(read_arriving_lines(1000))
    assert time.monotonic() - started < 5  # 1,000 lines would take 50 s
    assert group
    done.set()
    thread.join()
    os.close(writer)


def test_a_bad_line_is_named_and_those_before_it_are_read(writer):
    groups = read_arriving_lines(1000)
    os.write(writer, b"a\n")
    assert next(groups) == [(1, "a\n")]
    os.write(writer, b"the\xe9\n")
    os.close(writer)
    with pytest.raises(ValueError, match=r"standard input, line 2: not UTF-8 \(byte 0xe9 at column 4\)"):
        next(groups)
