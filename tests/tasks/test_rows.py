"""Rows of data files: outputs have a value or a reason for each row, in order."""

import pytest

from bertfast.tasks.rows import BadRows, Rows, Skipped
from bertfast.tasks.task import json_lines, write_aligned


def test_skipped_rows_stand_between_the_others():
    bad = BadRows("skip")
    rows = Rows("a.tsv", [1, 2, 3, 4], [2, 3, 4, 5], ["p", "q", "r", "s"], bad)
    rows.reject(1, "no label")
    bad.add("a.tsv, line 6: 1 field", file="a.tsv", row=5)
    aligned = list(rows.select([0, 2, 3]).aligned("abc"))
    assert aligned == [
        (1, "p", "a"),
        (2, "q", Skipped("a.tsv, line 3: no label", "q")),
        (3, "r", "b"),
        (4, "s", "c"),
        (5, None, Skipped("a.tsv, line 6: 1 field")),
    ]
    assert bad.count == 2


def test_bad_rows_stop_by_default_with_file_and_line():
    with pytest.raises(ValueError, match=r"^a\.tsv, line 3: no label$"):
        Rows("a.tsv", [1, 2], [2, 3]).reject(1, "no label")
    with pytest.raises(ValueError, match=r"^a\.json, row 1 \(id '7'\): no question$"):
        Rows("a.json", [1], None, ["7"]).reject(0, "no question")


def test_aligned_tables_say_why_rows_have_no_values(tmp_path):
    rows = Rows("a.csv", [1, 2], [2, 3], ["x\ty", None], BadRows("skip"))
    write_aligned(tmp_path / "a.tsv", rows, ["prediction"], [["yes"], ["no"]])
    assert (tmp_path / "a.tsv").read_text() == "row\tid\tprediction\n1\tx y\tyes\n2\t\tno\n"
    rows.reject(1, "empty")
    write_aligned(tmp_path / "a.tsv", rows.select([0]), ["prediction"], [["yes"]])
    assert (tmp_path / "a.tsv").read_text().splitlines()[1:] == ["1\tx y\tyes\t", "2\t\t\ta.csv, line 3: empty"]


def test_json_lines_keep_their_line_numbers():
    bad = BadRows("skip")
    objects, rows = json_lines(['{"a": 1}', "", '{"b": 2}', '{"a": 3}'], 11, '{"a": 1}', bad, set(), ("a", int))
    assert (objects, rows.numbers) == ([{"a": 1}, {"a": 3}], [11, 14])
    assert [*bad.skipped["standard input"]] == [12, 13]
