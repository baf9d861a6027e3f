"""Reading tables, and the errors of malformed ones."""

import gzip
import itertools
import json
import os
import threading
from pathlib import Path

import pytest

from bertfast.tasks.registry import choose_task
from bertfast.tasks.rows import BadRows
from bertfast.tasks.settings import TaskSettings
from bertfast.tasks.tables import read_chunks, read_table


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    opened = gzip.open if name.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        file.write(text)
    return path


ROWS = [('it\'s "good"', "1"), ("", "0"), ("na\u00efve\u2028film", "1")]  # U+2028 is not a line end


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tsv_and_jsonl_give_the_same_rows(tmp_path, compression, end):
    tsv = end.join(["sentence\tlabel", *("\t".join(row) for row in ROWS)])
    jsonl = end.join(json.dumps(dict(zip(("sentence", "label"), row, strict=True))) for row in ROWS) + end + end
    for name, text in (("a.tsv", tsv), ("a.jsonl", jsonl)):
        table = read_table(written(tmp_path, name + compression, text))
        assert table.texts("sentence") == [text for text, _ in ROWS]
        assert table.column("label") == [label for _, label in ROWS]
        assert table.rows.where(2).endswith(f"{name}{compression}, line {4 if 'tsv' in name else 3}")


SWALLOWED = "text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(9))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            SWALLOWED.replace("text 3", '"text 3').replace("text 6", 'text 6"'),
            "line 5: the quote that opens here swallows 3 further rows",
        ),
        (
            "a.csv",
            'text,score\na,0.1\n"b,0.2\nc,0.3\nd",0.4\ne,0.5\n',
            "line 3: the quote that opens here swallows 2 further rows",
        ),
        ("a.csv", SWALLOWED.replace("text 3", '"text 3'), "line 5: the quote that opens here is not closed"),
        ("a.csv", SWALLOWED.replace("text 8", '"text 8'), "line 10: the quote that opens here is never closed"),
        ("a.csv", SWALLOWED.replace("text 3", '"text" 3'), "line 5: ',' expected after '\"'; write a quote within"),
        ("a.csv", "text;label\nx;1\n", "line 1: the columns 'text;label' are separated by semicolons; replace them by"),
        ("a.csv", "text\tlabel\nx\t1\n", "are separated by tabs; give it the suffix .tsv"),
        ("a.tsv", "text,label\nx,1\n", "are separated by commas; give it the suffix .csv"),
        (
            "a.tsv",
            '{"text": "x", "label": 1}\n',
            "line 1: holds JSON; give a file of one JSON object per line",
        ),
        ("a.csv", "text\nx, y\n", "line 2: 2 fields where the header has 1; a field that holds a comma must be quoted"),
        ("a.tsv", "text\tlabel\ttext\nx\t1\ty\n", "line 1: two columns are called 'text'; rename one"),
        ("a.csv", "text,,label\nx,y,1\n", "line 1: column 2 of 3 has no name"),
        ("a.csv", "id,text\n7,x\n7,y\n", "line 3: the id '7' is repeated: remove the row, or rename the column 'id'"),
        ("a.jsonl", '{"idx": 7, "text": "x"}\n{"idx": 7, "text": "x"}\n', "line 2: the idx 7 is repeated"),
        ("a.csv", "text,label\nx,1\ntext,label\ny,0\n", "line 3: repeats the header; remove the line"),
        ("a.jsonl", '{"text": "x", "text": "y"}\n', "line 1: not JSON (the key 'text' is repeated)"),
        ("a.jsonl", '{"text": "\\ud83d"}\n', "line 1: unpaired surrogate"),
        ("a.tsv", "sentence\tlabel\none\t1\ntwo\n", "line 3: 1 field where the header has 2"),
        ("a.tsv", "sentence\tlabel\n", "holds no rows"),
        ("a.tsv", "", "holds no rows"),
        ("a.csv", 'sentence,label\n"one, and",1\ntwo\n', "line 3: 1 field where the header has 2"),
        ("a.odt", "sentence,label\n", "unknown file type; use one of .tsv"),
        ("a.jsonl", '{"sentence": "x"}\n{"sentence"\n', "line 2: not JSON (Expecting ':' delimiter at column 12)"),
        ("a.jsonl", '["x"]\n', "line 1: neither a list of two or more texts"),
        (
            "a.jsonl",
            '{"sentence": "x"}\n{"text": "y"}\n',
            "line 2: column 'sentence' is null or missing",
        ),
        ("a.jsonl", '{"sentence": "x"}\n{"sentence": 3}\n', "line 2: column 'sentence' holds 3, not a text"),
        ("a.tsv", "sentence\tlabel\n \t1\n\t0\n", "holds no text in its column 'sentence'"),
        (
            "a.tsv",
            "sentense\tlabel\nx\t1\n",
            "column 'sentence', only 'sentense', 'label'; did you mean 'sentense'?",
        ),
    ],
)
def test_errors_name_file_line_and_column(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=r"a\.") as caught:
        read_table(written(tmp_path, name, text)).texts("sentence")
    assert message in str(caught.value)


def test_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*a\.tsv"):
        read_table(tmp_path / "a.tsv")


def test_sst2_has_the_published_number_of_rows(shared_data):
    table = read_table(shared_data / "glue" / "SST-2" / "dev.tsv.gz")
    assert len(table) == 872
    assert table.texts("sentence")[0] == "one long string of cliches ."
    assert set(table.column("label")) == {"0", "1"}


def test_csv_fields_may_contain_quotes_and_line_ends(tmp_path):
    table = read_table(written(tmp_path, "a.csv.gz", '\ufeffsentence,label\n"a, ""b""\nc",1\nd,0\n'))
    assert table.texts("sentence") == ['a, "b"\nc', "d"]
    assert table.rows.lines == [2, 4]


def test_bad_rows_are_skipped_and_counted(tmp_path):
    bad = BadRows("skip")
    table = read_table(written(tmp_path, "a.tsv", "sentence\tlabel\none\t1\ntwo\nthree\t0\n"), bad=bad)
    assert (table.texts("sentence"), bad.count) == (["one", "three"], 1)
    table = read_table(written(tmp_path, "a.jsonl", '{"text": "x"}\n{"text"\n'), bad=bad)
    assert (len(table), bad.count) == (1, 2)


def test_repeated_ids_are_bad_rows_and_missing_ids_are_not(tmp_path):
    bad = BadRows("skip")
    table = read_table(written(tmp_path, "a.csv", "text,id\na,7\nb,\nc,7\nd,\n"), bad=bad)
    assert (table.column("text"), table.rows.ids, table.rows.numbers) == (["a", "b", "d"], ["7", "", ""], [1, 2, 4])
    assert bad.skipped[table.path][3].id == "7"


def test_long_fields_and_carriage_returns_are_read(tmp_path):
    text = "word " * 30_000
    assert read_table(written(tmp_path, "a.csv", f"sentence,label\n{text},1\n")).column("sentence") == [text]
    assert read_table(written(tmp_path, "b.csv", "sentence,label\rgood,1\rbad,0\r")).column("label") == ["1", "0"]


def test_line_breaks_in_quoted_texts_are_no_swallowed_rows(tmp_path):
    rows = [("Dear Sir, hello\nbye", "1"), ("one, 1\ntwo, 2\nthree, 3", "0"), ("a", "1"), ("b", "0")]
    text = "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows)
    table = read_table(written(tmp_path, "a.csv", text))
    assert list(zip(table.column("text"), table.column("label"), strict=True)) == rows
    assert table.rows.lines == [2, 4, 7, 8]


def test_swallowed_rows_are_found_in_a_short_last_chunk(tmp_path):
    path = written(tmp_path, "a.csv", SWALLOWED + '"x,0\ny,1\nz",0\n')
    with pytest.raises(ValueError, match="line 11: the quote that opens here swallows 2 further rows"):
        list(read_chunks(path, 9))


def test_rows_that_may_be_swallowed_are_reported_once(tmp_path, caplog):
    path = written(tmp_path, "a.csv", 'text\n"a\nb"\n"c\nd"\n')
    assert read_table(path).column("text") == ["a\nb", "c\nd"]
    [message] = caplog.messages
    assert message.startswith(
        f"{path}, line 2: the quote that opens here goes on for 2 lines; if these are rows, write"
    )


def test_empty_lines_are_rows_in_a_file_of_one_column_only(tmp_path):
    for suffix in ("tsv", "csv"):
        table = read_table(written(tmp_path, f"a.{suffix}", "text\nx\n\ny\n"))
        assert (table.column("text"), table.rows.numbers, table.rows.lines) == (["x", "", "y"], [1, 2, 3], [2, 3, 4])
        fields = ("text,label\nx,1\n\ny,0\n").replace(",", "," if suffix == "csv" else "\t")
        table = read_table(written(tmp_path, f"b.{suffix}", fields))
        assert (table.rows.numbers, table.rows.lines) == ([1, 2], [2, 4])


def test_an_unnamed_first_column_is_the_index_that_pandas_writes(tmp_path):
    assert read_table(written(tmp_path, "a.csv", ",text\n0,x\n")).column("text") == ["x"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_chunks_have_the_columns_of_the_file_and_number_their_rows(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    lines = {
        "csv": ["a,b", "1,x", "2,", "3,", "4,"],
        "jsonl": ['{"a": "1", "b": "x"}', *(f'{{"a": "{i}"}}' for i in "234")],
    }
    written(tmp_path, path.name, "\n".join(lines[suffix]))
    tables = list(read_chunks(path, 3))
    assert [table.rows.numbers for table in tables] == [[1, 2, 3], [4]]
    assert tables[1].column("a") == ["4"]
    assert tables[1].column("b") in ([""], [None])


ENDS = b"\r\n", b"\n", b"\r"


@pytest.mark.parametrize("ends", [*itertools.permutations(ENDS)], ids=repr)
@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_line_ends_may_be_mixed(name, ends, tmp_path):
    rows = [("text", "label"), ("one", "1"), ("two", "0"), ("three", "1"), ("four", "0")]
    separator = {"a.tsv": "\t", "a.csv": ","}.get(name)
    lines = [separator.join(row) if separator else json.dumps(dict(zip(rows[0], row, strict=True))) for row in rows]
    lines = lines if separator else lines[1:]
    content = b"".join(line.encode() + end for line, end in zip(lines, itertools.cycle(ends), strict=False))
    (tmp_path / name).write_bytes(content)
    table = read_table(tmp_path / name)
    assert (table.column("text"), table.column("label")) == tuple(map(list, zip(*rows[1:], strict=True)))
    first = 2 if separator else 1
    assert table.rows.lines == [*range(first, first + 4)]


def test_a_carriage_return_within_a_text_is_part_of_it(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"text\tlabel\none\rtwo\t1\n")
    (tmp_path / "a.csv").write_bytes(b'text,label\n"one\rtwo",1\n')
    for name in ("a.tsv", "a.csv"):
        assert read_table(tmp_path / name).column("text") == ["one\rtwo"]


@pytest.mark.parametrize("suffix", ["tsv", "jsonl", "conll", "json"])
def test_named_pipes_are_read_or_refused_with_the_remedy(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    os.mkfifo(path)
    if suffix == "tsv":
        writer = threading.Thread(target=path.write_text, args=("sentence\tlabel\na\tx\n",))
        writer.start()
        assert read_table(path).columns == {"sentence": ["a"], "label": ["x"]}
        writer.join()
        return
    with pytest.raises(ValueError, match=r"is a pipe, which can be read only once: write its text to a file"):
        choose_task(TaskSettings.of(model_name_or_path="model"), file=str(path)).read(str(path), labelled=True)
