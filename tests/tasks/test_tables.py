"""Reading tables, and the errors of malformed ones."""

import gzip
import json
from pathlib import Path

import pytest

from bertfast.tasks.rows import BadRows
from bertfast.tasks.tables import read_table


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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "sentence\tlabel\none\t1\ntwo\n", "line 3: 1 field where the header has 2"),
        ("a.tsv", "sentence\tlabel\n", "holds no rows"),
        ("a.tsv", "", "holds no rows"),
        ("a.csv", 'sentence,label\n"one, and",1\ntwo\n', "line 3: 1 field where the header has 2"),
        ("a.odt", "sentence,label\n", "unknown file type; use one of .tsv"),
        ("a.jsonl", '{"sentence": "x"}\n{"sentence"\n', "line 2: not JSON"),
        ("a.jsonl", '["x"]\n', "line 1: not an object"),
        (
            "a.jsonl",
            '{"sentence": "x"}\n{"text": "y"}\n',
            "line 2: column 'sentence' holds null, not a text",
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
