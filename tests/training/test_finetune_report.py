"""run.json, the model card, and the last line of the output say how a model was made and how to use it."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from sentiment import QUICK
from task_examples import settings_for, write_examples

import bertfast
from bertfast.cli.main import main
from bertfast.runtime.machine import commit, processor
from bertfast.training.finetuning import FinetuneSettings, finetune

pytestmark = pytest.mark.slow


def card_of(folder: Path) -> tuple[dict, str]:
    """Return the entries and the text of a model card."""
    _, entries, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(entries), text


def test_run_json_has_settings_versions_hashes_and_results(tuned, pretrained, files):
    folder, results = tuned
    run = json.loads((folder / "run.json").read_text())
    assert run["results"] == results
    assert (run["command"], run["precision"], run["threads"]) == ("finetune", "fp32", torch.get_num_threads())
    assert (run["commit"], run["processor"]) == (commit(), processor())
    assert run["versions"]["bertfast"] == bertfast.__version__
    assert run["versions"]["torch"] == torch.__version__
    assert FinetuneSettings.of(**run["settings"]).flat() == run["settings"]
    assert run["settings"]["learning_rate"] == 3e-3
    for flag, file in ({f"--{name.replace('_', '-')}": path for name, path in files.items()}).items():
        (found,) = run["inputs"][flag]
        assert found["path"] == file
        assert found["sha256"] == hashlib.sha256(Path(file).read_bytes()).hexdigest()
    weights = hashlib.sha256((pretrained / "model.safetensors").read_bytes()).hexdigest()
    assert weights in [file["sha256"] for file in run["inputs"]["--model-name-or-path"]]


def test_the_model_card_names_results_data_and_settings(tuned, pretrained):
    folder, results = tuned
    entries, text = card_of(folder)
    assert entries == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["bertfast"],
    }
    assert f"# {folder.name}\n" in text
    assert f"fine-tuned from the model `{pretrained.name}`" in text
    assert f"| validation | accuracy | {results['eval_accuracy']:.4g} |" in text
    assert "| --train-file | `train.tsv`, SHA-256 " in text
    assert "| --learning-rate | 0.003 |" in text
    report = json.loads((folder / "report_validation.json").read_text())
    assert f"| good | {report['classes']['good']['precision']:.4g} |" in text
    assert str(folder.parent) not in text


def test_the_model_card_lists_only_settings_that_were_in_effect(pretrained, files, tmp_path):
    values = {"model_name_or_path": str(pretrained), "train_file": files["train_file"], **QUICK}
    listed = {}
    for name, length in (("steps", {"max_steps": 2}), ("epochs", {"num_train_epochs": 0.1})):
        finetune(FinetuneSettings.of(**values, **length, output_dir=str(tmp_path / name)))
        listed[name] = re.findall(r"^\| (--\S+) \| (.*) \|$", card_of(tmp_path / name)[1], re.MULTILINE)
    assert ("--max-steps", "2") in listed["steps"]
    assert ("--num-train-epochs", "0.1") in listed["epochs"]
    rest = [
        {name: value for name, value in rows if name not in ("--max-steps", "--num-train-epochs")}
        for rows in listed.values()
    ]
    assert rest[0] == rest[1]
    assert len(rest[0]) == len(listed["steps"]) - 1 == len(listed["epochs"]) - 1
    assert "None" not in rest[0].values()


def run_command(text: str, pipe) -> int:
    """Run the command of a model card, "printf TEXT | bertfast …", and return its status."""
    printf, content, bar, program, *arguments = shlex.split(re.search(r"## Use\n\n```\n(.*)\n```", text)[1])
    assert (printf, bar, program) == ("printf", "|", "bertfast")
    pipe(content.encode().decode("unicode_escape"))
    return main(arguments)


@pytest.mark.parametrize(
    "task", ["sequence-classification", "token-classification", "question-answering", "multiple-choice"]
)
def test_the_code_of_the_model_card_opens_the_model(task, pretrained, tmp_path, monkeypatch, pipe, capsys):
    finetune(settings_for(task, pretrained, write_examples(tmp_path, task, 16, seed=0), tmp_path / "my tuned"))
    entries, text = card_of(tmp_path / "my tuned")
    assert entries["pipeline_tag"] == task.replace("sequence", "text")
    code = re.search("```python\n(.*?)```", text, re.DOTALL)[1]
    found: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(code, found)
    assert type(found["model"]) is getattr(transformers, f"BertFor{task.title().replace('-', '')}")
    assert found["tokenizer"]("good film")["input_ids"]
    capsys.readouterr()
    assert run_command(text, pipe) == 0
    (prediction,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert prediction["row"] == 1


def test_commands_read_files_and_predict_as_the_run_did(pretrained, tmp_path, monkeypatch, pipe, capsys):
    rows: list[dict] = [{"the text": f"the film was {word}", "label": word} for word in ("good", "bad")] * 8
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"label": "good"}]))
    monkeypatch.chdir(tmp_path)
    flags = ["--text-column", "the text", "--on-bad-rows", "skip", "--max-seq-length", "8", "--device", "cpu"]
    flags += ["--task", "sequence-classification", "--max-steps", "1", "--output-dir", "out"]
    assert main(["finetune", "--model-name-or-path", str(pretrained), "--train-file", "a.jsonl", *flags]) == 0
    command = capsys.readouterr().out.splitlines()[-1].split(": bertfast ")[1]
    _, text = card_of(tmp_path / "out")
    added = shlex.split(re.search(r"Add `(.*)` for the rows of a file", text)[1].replace("FILE", "a.jsonl"))
    of_card = shlex.split(re.search(r"\| bertfast (.*)\n", text)[1])
    assert "--max-seq-length" in of_card
    for arguments in (shlex.split(command), [*of_card, *added]):
        assert main(arguments) == 0
        predictions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert ["skipped" in prediction for prediction in predictions] == [False] * 16 + [True]
    assert run_command(text, pipe) == 0


def test_the_card_of_a_model_with_further_parts_names_only_bertfast(pretrained, tmp_path):
    file = write_examples(tmp_path, "token-classification", 16, seed=0)
    finetune(settings_for("token-classification", pretrained, file, tmp_path / "out", bilstm=True))
    _, text = card_of(tmp_path / "out")
    assert "only bertfast opens it" in text
    assert "from_pretrained" not in text


def test_a_readme_of_the_user_is_kept_and_one_of_bertfast_replaced(pretrained, tmp_path):
    file = write_examples(tmp_path, "sequence-classification", 16, seed=0)
    settings = settings_for("sequence-classification", pretrained, file, tmp_path / "out", num_train_epochs=1)
    (tmp_path / "out").mkdir()
    readme = tmp_path / "out" / "README.md"
    readme.write_bytes(b"# Mine \xff")
    finetune(settings)
    assert readme.read_bytes() == b"# Mine \xff"
    readme.unlink()
    for rate in (0.001, 0.002):
        finetune(settings.replace(learning_rate=rate, overwrite_output_dir=True))
        assert f"| --learning-rate | {rate} |" in readme.read_text()


def test_the_last_line_of_the_output_is_a_command_that_runs(pretrained, files, tmp_path, capsys):
    arguments = ["--output-dir", str(tmp_path / "my model"), "--num-train-epochs", "0.1", "--device", "cpu"]
    assert (
        main(["finetune", "--model-name-or-path", str(pretrained), "--train-file", files["train_file"], *arguments])
        == 0
    )
    said, command = capsys.readouterr().out.splitlines()[-1].split(": bertfast ")
    assert said == f"The best model is in {tmp_path / 'my model'}. To predict with it"
    assert main(shlex.split(command)) == 0
    predictions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(predictions) == 320
    assert {prediction["label"] for prediction in predictions} <= {"bad", "good"}
