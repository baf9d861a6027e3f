"""Rows of data files: outputs have a value or a reason for each row, in order."""

import pytest

from bertfast.tasks.rows import BadRows, Rows, Skipped
from bertfast.tasks.tables import read_table
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


def test_bad_rows_are_logged_in_the_order_of_their_file(caplog):
    bad = BadRows("skip")
    with bad.logged():
        for row in (9, 3, 7, 5, 3):  # 3 twice, as when the same file is that of two splits
            bad.add(f"a.json, row {row}: no label", file="a.json", row=row)
    assert bad.count == 4
    assert [record.message for record in caplog.records] == [
        f"skipped: a.json, row {row}: no label" for row in (3, 5, 7)
    ]
    bad.add("a.json, row 10: no label", file="a.json", row=10)
    bad.log_skipped()
    assert len(caplog.records) == 3  # further rows are only counted


def test_rows_of_a_list_in_json_are_named_by_number(tmp_path):
    """Many may be on one line."""
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a", "id": 1}, 3, {"text": "b", "id": 1}, {"text": null, "id": ""}]')
    bad = BadRows("skip")
    assert read_table(path, bad=bad).texts("text") == ["a"]
    assert {row: skipped.problem.removeprefix(f"{path}, ")[:20] for row, skipped in bad.skipped[str(path)].items()} == {
        2: "row 2: not an object",
        3: "row 3 (id 1): the id",
        4: "row 4: column 'text'",
    }
