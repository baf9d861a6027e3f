"""Reproduction of the paper's tables, with small models and little data, and their recipes."""

import json
from pathlib import Path

import pytest
import yaml

from bertfast.cli.flags import flags_of, parse
from bertfast.cli.recipes import recipes_folder
from bertfast.cli.reproduce import ReproduceSettings, check_recipe, reproduce
from bertfast.data.prepare import CorpusSettings
from bertfast.runtime.machine import commit, processor
from bertfast.runtime.output_folder import OriginError
from bertfast.training.finetuning import FinetuneSettings
from bertfast.training.pretraining import PretrainSettings

RECIPES = recipes_folder() / "paper"

COLUMN = {
    "task": "sequence-classification",
    "train-file": "a.tsv",
    "validation-file": "a.tsv",
    "metric": "accuracy",
}
TABLE = {
    "title": "Table 5: a few",
    "paper": "of others",
    "note": "A note.",
    "finetune": {"num-train-epochs": 1, "per-device-train-batch-size": 8, "max-seq-length": 32},
    "columns": {
        "perplexity": {"metric": "perplexity"},
        "Own": COLUMN,
        "Other": COLUMN | {"train-file": "none.tsv"},
    },
    "rows": [
        {"name": "as usual", "paper": {"Own": 90.1}},
        {"name": "LTR", "pretrain": {"objective": "ltr"}, "paper": {"Own": 80.0, "Other": 70}},
    ],
}


@pytest.mark.parametrize("number", range(1, 9))
def test_recipes_use_valid_flags_and_columns(number):
    path = RECIPES / f"table-{number}.yaml"
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    check_recipe(table, path)
    for row in table["rows"]:
        assert set(row.get("paper", {})) <= set(table["columns"])
        parse("pretrain", PretrainSettings, ["--output-dir", "out", *flags_of(row.get("pretrain", {}))])
        for column in table["columns"].values():
            flags = table.get("finetune", {}) | column.get("finetune", {}) | row.get("finetune", {})
            fixed = ["--model-name-or-path", "m", "--train-file", "t", "--output-dir", "o"]
            parse("finetune", FinetuneSettings, [*fixed, *flags_of(flags)])


def write_data(folder: Path) -> Path:
    for split, rows in (("train", 24), ("valid", 12)):
        (folder / "corpus").mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(f"The film {i} was good. It had a plot.\nThe actor was bad." for i in range(rows))
        (folder / "corpus" / f"books-{split}.txt").write_text(text)
    return folder


@pytest.mark.slow
def test_a_table_is_filled_cell_by_cell_and_runs_are_not_repeated(tmp_path, monkeypatch, caplog, capsys):
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "table-5.yaml").write_text(yaml.safe_dump(TABLE, sort_keys=False))
    data = write_data(tmp_path / "data")
    rows = [f"the film was {word}\t{word}" for word in ("good", "bad")] * 12
    (data / "a.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    files = [str(data / "corpus" / f"books-{split}.txt") for split in ("train", "valid")]
    corpus = CorpusSettings(files[:1], files[1:], vocab_size=128, processes=1)
    monkeypatch.setattr("bertfast.cli.reproduce._corpus", lambda folder: corpus)
    settings = ReproduceSettings(
        table=5,
        data=str(data),
        output_dir=str(tmp_path / "out"),
        recipes=str(recipes),
        preset="tiny",
        minutes=0.02,
        tokens_per_batch=256,
        seeds=[1, 2],
        device="cpu",
    )
    page = reproduce(settings).read_text()
    assert "there is no checkpoint" not in caplog.text
    cells = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in page.splitlines() if "|" in line
    }
    assert float(cells["as usual"][0]) > 1
    assert cells["as usual"][1].endswith(" (90.1)")
    assert " ± " in cells["LTR"][1]
    assert cells["LTR"][2] == "no data (70)"
    config = json.loads((tmp_path / "out" / "model-objective-ltr" / "config.json").read_text())
    assert (config["is_decoder"], config["pool_last"]) == (True, True)
    check_record(tmp_path / "out" / "table-5.json", cells)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")}
    assert len(times) >= 4
    assert reproduce(settings).read_text() == page
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")}
    (tmp_path / "out" / "ltr-own-2" / "all_results.json").unlink()  # as after an interrupted run
    assert reproduce(settings).read_text() == page
    with pytest.raises(OriginError, match=r"--learning-rate was 0\.0001 and is 0\.5: .*--overwrite-output-dir"):
        reproduce(settings.replace(learning_rate=0.5))
    with pytest.raises(OriginError, match=r"--minutes was 0\.02 and is 0\.03"):
        reproduce(settings.replace(minutes=0.03))
    (data / "a.tsv").write_text("\n".join(["sentence\tlabel", *rows, *rows]))
    with pytest.raises(OriginError, match=r"--train-file was .* and is .*; --validation-file was"):
        reproduce(settings)
    reproduce(settings.replace(overwrite_output_dir=True))
    models, runs = ({p for p in times if ("model-" in str(p.parent)) is is_model} for is_model in (True, False))
    assert models
    assert runs
    assert all(times[path] == path.stat().st_mtime_ns for path in models)
    assert not any(times[path] == path.stat().st_mtime_ns for path in runs)
    with pytest.raises(FileNotFoundError, match="there is no recipe"):
        reproduce(settings.replace(table=8))


def check_record(file: Path, cells: dict[str, list[str]]) -> None:
    """Check that the JSON file of a table says where each of its figures comes from."""
    record = json.loads(file.read_text())
    assert str(file.parents[1]) not in file.read_text()
    assert record["origin"]["commit"] == commit()
    assert record["origin"]["processor"] == processor()
    assert {"bertfast", "torch", "transformers"} <= record["origin"]["versions"].keys()
    assert (record["seeds"], record["preset"], record["minutes"]) == ([1, 2], "tiny", 0.02)
    found = {(cell["row"], cell["column"]): cell for cell in record["cells"]}
    assert len(found) == 6
    perplexity, own, absent = (found["LTR", column] for column in ("perplexity", "Own", "Other"))
    assert f"{perplexity['scores'][0]:.2f}" == perplexity["text"] == cells["LTR"][0]
    assert own["pretraining"] == perplexity["pretraining"]
    assert own["pretraining"]["settings"]["--objective"] == "ltr"
    assert own["pretraining"]["precision"] in ("fp32", "bf16")
    assert (own["text"], own["metric"], own["paper"]) == (cells["LTR"][1].removesuffix(" (80.0)"), "accuracy", 80.0)
    assert [run["seed"] for run in own["runs"]] == [1, 2]
    for score, run in zip(own["scores"], own["runs"], strict=True):
        assert score == 100 * run["results"]["eval_accuracy"]
        assert run.keys() >= {"commit", "processor", "device", "threads", "precision", "versions"}
    assert (absent["text"], absent["scores"], absent["runs"]) == ("no data", [], [])


@pytest.mark.parametrize("table", [1, 7])
def test_a_folder_without_the_data_of_the_table_is_refused_and_nothing_written(table, tmp_path):
    settings = ReproduceSettings(table=table, data=str(tmp_path / "none"), output_dir=str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match=r"--data .*none: no such folder"):
        reproduce(settings)
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"has no data for table {table}: it requires .*train"):
        reproduce(settings.replace(data=str(tmp_path / "data")))
    assert not (tmp_path / "out").exists()


def test_an_unknown_column_is_refused_and_the_closest_one_suggested(tmp_path):
    settings = ReproduceSettings(table=5, data=str(tmp_path), output_dir=str(tmp_path / "out"), only=["SST2"])
    with pytest.raises(ValueError, match="--only SST2: table 5 has no such column; did you mean SST-2"):
        reproduce(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 3}, "rows must be a list, got 3"),
        ({"rows": ["a"]}, "row 1 must hold `name: value` lines, got 'a'"),
        ({"rows": [{"finetune": {}}]}, "row 1 has no name"),
        ({"columns": {"Own": {"metric": "f1"}}}, "column Own has no task"),
        ({"columns": {"Own": COLUMN | {"train-file": 3}}}, "column Own: train-file must be text, got 3"),
    ],
)
def test_a_recipe_without_an_entry_or_with_another_type_is_refused_by_name(changes, message, tmp_path):
    path = tmp_path / "table-5.yaml"
    path.write_text(yaml.safe_dump(TABLE | changes))
    settings = ReproduceSettings(table=5, data=str(tmp_path), output_dir=str(tmp_path / "out"), recipes=str(tmp_path))
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        reproduce(settings)


def test_a_table_of_models_to_pre_train_requires_a_corpus(tmp_path):
    (tmp_path / "table-5.yaml").write_text(yaml.safe_dump(TABLE))
    (tmp_path / "a.tsv").write_text("")
    settings = ReproduceSettings(table=5, data=str(tmp_path), output_dir=str(tmp_path / "out"), recipes=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"corpus has no \*-train\*\.txt\.xz to pre-train on"):
        reproduce(settings)
    assert not (tmp_path / "out").exists()


def test_a_metric_that_the_task_does_not_have_is_refused(pretrained, tmp_path):
    column = COLUMN | {"metric": "f7"}
    table = TABLE | {"columns": {"A": column}, "rows": [{"name": "a"}], "finetune": {"num-train-epochs": 1}}
    (tmp_path / "table-5.yaml").write_text(yaml.safe_dump(table))
    rows = [f"the film was {word}\t{word}" for word in ("good", "bad")] * 4
    (tmp_path / "a.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    folders = {"data": str(tmp_path), "output_dir": str(tmp_path / "out"), "recipes": str(tmp_path)}
    settings = ReproduceSettings(table=5, model_name_or_path=str(pretrained), device="cpu", **folders)
    with pytest.raises(ValueError, match=r"column A: .* has no f7; give the recipe one of .*accuracy"):
        reproduce(settings)


@pytest.mark.parametrize("table", [0, 9])
def test_a_number_that_no_table_has_is_refused(table):
    with pytest.raises(ValueError, match="--table must be from 1 to 8"):
        ReproduceSettings(table=table, data="data", output_dir="out")
