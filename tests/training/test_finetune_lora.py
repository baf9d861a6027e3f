"""LoRA: what is trained, adapters that peft opens, merging, resuming, and what is refused."""

import json
import sys

import pytest
import torch
import transformers
from family_models import PREFIXES, write_model
from runs import assert_same_finetuning, stopped_at
from safetensors.torch import load_file
from sentiment import QUICK, rows_of
from task_examples import padded, settings_for, write_examples
from text_pairs import write_pairs

import bertfast
from bertfast.cli.main import main
from bertfast.inference.predict import open_finetuned, predict_outputs
from bertfast.models.files import load
from bertfast.models.weights import is_adapter
from bertfast.runtime.signals import RunStopped
from bertfast.tasks.settings import TaskSettings
from bertfast.training.finetuning import FinetuneSettings, Finetuning, finetune

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

BASE = "base_model_name_or_path"
LORA = {"lora_rank": 4, "lora_target_modules": ["all-linear"], "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def adapted(pretrained, files, tmp_path_factory):
    """Return the folder of a run with an adapter, and its results."""
    folder = tmp_path_factory.mktemp("adapted")
    values = {"model_name_or_path": str(pretrained), "output_dir": str(folder)}
    return folder, finetune(FinetuneSettings.of(**values, **files, **QUICK | LORA))


def predictions(folder, file, capsys) -> list[dict]:
    assert main(["predict", "--model-name-or-path", str(folder), "--input-file", file, "--precision", "fp32"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_an_adapter_learns_and_leaves_the_model_as_it_is(adapted, pretrained):
    folder, results = adapted
    assert results["eval_accuracy"] == 1
    assert is_adapter(folder)
    assert not [*folder.glob("model*")]
    saved, base = load_file(folder / "adapter_model.safetensors"), load_file(pretrained / "model.safetensors")
    assert {name.split(".")[-2] for name in saved} == {"lora_A", "lora_B", "classifier"}
    run = Finetuning(settings_of(folder, pretrained))
    for name, value in run.model.state_dict().items():
        if "lora_" not in name and not name.startswith("classifier"):
            assert torch.equal(value, base[name.replace(".base_layer", "")])


def settings_of(folder, pretrained, **changes) -> FinetuneSettings:
    """Return settings of a run on few examples, in a folder next to `folder`."""
    file = write_examples(folder.parent, "sequence-classification", 48, seed=0)
    output = folder.with_name(f"{folder.name}-other")
    return settings_for("sequence-classification", pretrained, file, output, **LORA | changes)


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_peft_opens_the_adapter_and_gives_the_same_outputs(task, pretrained, tmp_path):
    kind = {"SequenceClassification": "sequence-classification", "TokenClassification": "token-classification"}
    name = kind.get(task, "question-answering")
    file = write_examples(tmp_path, name, 24, seed=0)
    finetune(settings_for(name, pretrained, file, tmp_path / "out", lora_rank=2, max_steps=5))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    base = getattr(transformers, f"AutoModelFor{task}").from_pretrained(pretrained, config=config)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    merged = load(getattr(bertfast, f"BertFor{task}"), tmp_path / "out")[0]
    assert not any(module.training for module in merged.modules())
    ids = torch.arange(12).view(2, 6) + 5
    with torch.no_grad():
        expected, found = model(input_ids=ids), merged(input_ids=ids)
    for one, other in zip(expected.to_tuple(), found.to_tuple(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    changed = [name for name, value in model.named_parameters() if "lora_B" in name and value.any()]
    assert {name.split(".")[-4] for name in changed} == {"query", "value"}


FAMILIES = [
    name for name in ("bert", "roberta", "distilbert", "modernbert", "nomic_bert", "eurobert") if name in PREFIXES
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [[], ["all-linear"]], ids=["default", "all-linear"])
def test_peft_opens_adapters_of_other_families(family, targets, tmp_path, monkeypatch):
    """Also of an encoder without head and pooler, which are new and saved with the adapter."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = write_model(family, tmp_path / "base", ["the film was good", "a bad film it was"] * 10)
    folder, file = tmp_path / "out", write_examples(tmp_path, "sequence-classification", 24, seed=0)
    options = {"lora_rank": 2, "lora_target_modules": targets, "max_steps": 4}
    finetune(settings_for("sequence-classification", base, file, folder, **options))
    config = transformers.AutoConfig.from_pretrained(folder)
    hf = transformers.AutoModelForSequenceClassification.from_pretrained(base, config=config)
    hf = peft.PeftModel.from_pretrained(hf, folder).eval()
    task, model, tokenizer = open_finetuned(TaskSettings.of(model_name_or_path=str(folder), precision="fp32"))
    _, features = task.featurize(task.read(str(file), labelled=True), tokenizer, 40)
    outputs = predict_outputs(task, model, features)
    for row in range(3):
        ids = torch.from_numpy(features.token_ids[slice(*features.cu_seqlens[row : row + 2])][None].astype("int64"))
        with torch.no_grad():
            expected = hf(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        torch.testing.assert_close(torch.from_numpy(outputs[row]), expected, rtol=1e-3, atol=1e-4)


def test_losses_are_those_of_peft_in_transformers(pretrained, tmp_path):
    """Of the first steps, in the same order, without dropout."""
    run = Finetuning(settings_of(tmp_path / "run", pretrained, weight_decay=0.0, max_steps=6))
    config, rows = run.config, run.rows_of_steps()
    run.adapter.save(tmp_path / "initial")
    base = transformers.BertForSequenceClassification.from_pretrained(pretrained, config=config)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "initial", is_trainable=True).train()
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(6):
        indices, rate = next(rows), run.learning_rate
        run.train_step(indices)
        loss = model(**padded(run.features["train"], indices)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        run.read_pending()
        assert run.results.losses[-1] == pytest.approx(loss.item(), abs=1e-5)


def test_a_merged_adapter_is_a_whole_model_with_the_same_predictions(adapted, pretrained, files, tmp_path, capsys):
    values = {"model_name_or_path": str(pretrained), "output_dir": str(tmp_path)}
    results = finetune(FinetuneSettings.of(**values, **files, **QUICK | LORA, lora_merge=True))
    assert not [*tmp_path.glob("adapter*")]
    transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert results["eval_loss"] == adapted[1]["eval_loss"]
    whole, adapter = (predictions(folder, files["test_file"], capsys) for folder in (tmp_path, adapted[0]))
    assert [one["label"] for one in whole] == [one["label"] for one in adapter]
    assert [one["score"] for one in whole] == pytest.approx([one["score"] for one in adapter], abs=1e-5)
    tested, expected = (rows_of(folder / "predictions_test.tsv") for folder in (tmp_path, adapted[0]))
    assert [row[2] for row in tested] == [row[2] for row in expected]


@pytest.mark.parametrize("merge", [False, True])
def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_one(merge, pretrained, tmp_path):
    options = {"lora_dropout": 0.2, "lora_merge": merge, "eval_steps": 2, "validation_file": str(tmp_path / "a.tsv")}
    settings = settings_of(tmp_path / "whole", pretrained, **options)
    steps = Finetuning(settings).steps
    finetune(settings)
    cut = settings.replace(output_dir=str(tmp_path / "cut"))
    for step in (3, steps // 2, steps):
        with pytest.raises(RunStopped, match=f"stopped after step {step} of {steps}, with a checkpoint"):
            finetune(cut, stopped_at(step))
        assert [*(tmp_path / "cut" / "checkpoints").glob(f"step-*{step}/adapter_model.safetensors")]
        cut = cut.replace(resume=True)
    finetune(cut)
    pattern = "model" if merge else "adapter_model"
    assert_same_finetuning(tmp_path / "whole-other", tmp_path / "cut", pattern)


@pytest.mark.parametrize("task", ["embedding", "reranking", "multiple-choice"])
def test_other_tasks_are_trained_by_adapters(task, pretrained, tmp_path, capsys):
    if task == "multiple-choice":
        file = write_examples(tmp_path, task, 24, seed=0)
    else:
        file = write_pairs(tmp_path / "a.tsv", "pairs" if task == "embedding" else "labelled", 24)
    settings = settings_for(task, pretrained, file, tmp_path / "out", max_steps=3, **LORA)
    finetune(settings)
    assert is_adapter(tmp_path / "out")
    assert len(predictions(tmp_path / "out", str(file), capsys)) == 24


@pytest.mark.parametrize(("family", "merge"), [*((family, False) for family in PREFIXES), ("roberta", True)])
@pytest.mark.parametrize("task", ["embedding", "reranking"])
def test_sentence_transformers_opens_the_adapter(task, family, merge, tmp_path, monkeypatch, capsys):
    """And gives what bertfast gives; the code on the card opens it as well."""
    st = pytest.importorskip("sentence_transformers", minversion="6")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = write_model(family, tmp_path / "base", ["the film was good", "a bad film it was"] * 10)
    file = write_pairs(tmp_path / "a.tsv", "pairs" if task == "embedding" else "labelled", 24)
    options = {"lora_rank": 2, "max_steps": 4, "learning_rate": 1e-2, "lora_merge": merge}
    finetune(settings_for(task, base, file, tmp_path / "out", **options))
    assert is_adapter(tmp_path / "out") != merge
    assert (tmp_path / "out" / "modules.json").exists() == (task == "embedding" or not merge)
    rows = [line.split("\t")[:2] for line in file.read_text().splitlines()[1:]]
    if task == "embedding":
        model = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
        first, second = (torch.from_numpy(model.encode([*texts])) for texts in zip(*rows, strict=True))
        expected = torch.cosine_similarity(first, second).tolist()
    else:
        expected = st.CrossEncoder(str(tmp_path / "out"), device="cpu").predict(rows).tolist()
    found = [one["score"] for one in predictions(tmp_path / "out", str(file), capsys)]
    assert found == pytest.approx(expected, abs=1e-5)
    monkeypatch.chdir(tmp_path)
    blocks = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1:]
    for block in blocks:
        exec(block.partition("```")[0], {})
    assert len(blocks) == 2 - merge


def test_a_reranker_can_be_an_adapter_of_a_classifier(tuned, tmp_path, capsys):
    """Whose head has another number of labels."""
    st = pytest.importorskip("sentence_transformers", minversion="6")
    file = write_pairs(tmp_path / "a.tsv", "labelled", 24)
    finetune(settings_for("reranking", tuned[0], file, tmp_path / "out", lora_rank=2, max_steps=4))
    rows = [line.split("\t")[:2] for line in file.read_text().splitlines()[1:]]
    expected = st.CrossEncoder(str(tmp_path / "out"), device="cpu").predict(rows).tolist()
    assert [one["score"] for one in predictions(tmp_path / "out", str(file), capsys)] == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize(("first", "second"), [("reranking", "embedding"), ("embedding", "reranking")])
def test_embeddings_and_rerankers_start_from_adapters_of_each_other(first, second, pretrained, tmp_path):
    """With --pooling, as an adapter of a reranker has modules without one."""
    forms = {"reranking": "labelled", "embedding": "pairs"}
    files = {task: write_pairs(tmp_path / f"{task}.tsv", form, 24) for task, form in forms.items()}
    finetune(settings_for(first, pretrained, files[first], tmp_path / "a", max_steps=3, **LORA))
    options = {"pooling": "mean"} if second == "embedding" else {}
    run = Finetuning(settings_for(second, tmp_path / "a", files[second], tmp_path / "b", max_steps=1, **options))
    key = "encoder.layer.0.attention.self.query"
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    prefix = "bert." * (first == "reranking")
    up, down = (saved[f"base_model.model.{prefix}{key}.lora_{side}.weight"] for side in "BA")
    base = load(bertfast.BertModel, pretrained)[0]
    expected = base.get_parameter(f"{key}.weight") + 2 * up @ down
    torch.testing.assert_close(run.model.base_model.get_parameter(f"{key}.weight"), expected)


def test_adapters_of_embeddings_are_opened_by_all_commands(pretrained, tmp_path, capsys):
    file = write_pairs(tmp_path / "a.tsv", "pairs", 24)
    finetune(settings_for("embedding", pretrained, file, tmp_path / "out", max_steps=3, **LORA))
    assert not (tmp_path / "out" / "config.json").exists()
    adapter = ["--model-name-or-path", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["evaluate", *adapter, "--validation-file", str(file)]) == 0
    assert "eval_ndcg_at_10" in capsys.readouterr().out
    (tmp_path / "a.txt").write_text("a good film\n")
    assert main(["embed", *adapter, "--input-file", str(tmp_path / "a.txt"), "--output-dir", str(tmp_path / "v")]) == 0
    train = [*adapter, "--train-file", str(file), "--max-steps", "1", "--task", "embedding"]
    assert main(["finetune", *train, "--output-dir", str(tmp_path / "next")]) == 0
    other = ["--model-name-or-path", str(pretrained), "--init-from-task", str(tmp_path / "out"), "--device", "cpu"]
    more = ["--train-file", str(file), "--max-steps", "1", "--task", "embedding", "--output-dir", str(tmp_path / "b")]
    assert main(["finetune", *other, *more]) == 0


@pytest.mark.parametrize("task", ["token-classification", "question-answering"])
def test_an_adapter_is_the_initial_model_of_another_task(task, adapted, tmp_path):
    """With another head: that of the adapter is not used."""
    file = write_examples(tmp_path, task, 24, seed=0)
    run = Finetuning(settings_for(task, adapted[0], file, tmp_path / "out", max_steps=2))
    assert all(parameter.requires_grad for parameter in run.model.parameters())
    values = run.model.state_dict()
    key = "bert.encoder.layer.0.attention.self.query"
    saved = load_file(adapted[0] / "adapter_model.safetensors")
    up, down = (saved[f"base_model.model.{key}.lora_{side}.weight"] for side in "BA")
    base = load(bertfast.BertModel, json.loads((adapted[0] / "adapter_config.json").read_text())[BASE])[0]
    expected = base.get_parameter(f"{key.removeprefix('bert.')}.weight") + 2 * up @ down
    torch.testing.assert_close(values[f"{key}.weight"], expected)


def test_the_model_card_says_how_to_open_the_adapter(adapted, pretrained, files, tmp_path, monkeypatch):
    card = (adapted[0] / "README.md").read_text()
    assert "library_name: peft" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(adapted[0].parent)
    scope = {}
    exec(code, scope)
    assert isinstance(scope["model"], peft.PeftModel)


def test_what_cannot_be_adapted_is_refused(adapted, pretrained, files, tmp_path, capsys, monkeypatch):
    run = ["finetune", "--model-name-or-path", str(pretrained), "--train-file", files["train_file"]]
    run += ["--output-dir", str(tmp_path / "out"), "--max-steps", "1", "--device", "cpu"]
    for flags, message in {
        "--lora-rank 2 --lora-target-modules Wqkv": "--lora-target-modules has Wqkv, which is no linear layer of this "
        "model: choose among query, key, value, dense, or all-linear",
        "--lora-alpha 2": "--lora-alpha would have no effect: there is no --lora-rank",
        "--lora-rank 2 --random-init": "--lora-rank adapts a pre-trained model, and excludes --random-init",
        f"--lora-rank 2 --model-name-or-path {adapted[0]}": f"{adapted[0]} is itself an adapter, on which peft can put",
    }.items():
        assert main([*run, *flags.split()]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out" / "config.json").exists()
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.json", "adapter_model.safetensors", "tokenizer.json", "adapter_config.json"):
        (moved / name).write_bytes((adapted[0] / name).read_bytes())
    options = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(options | {"base_model_name_or_path": "/nowhere"}))
    assert main(["predict", "--model-name-or-path", str(moved), "--input-file", files["test_file"]]) == 1
    assert "the base model of the adapter in" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main([*run, "--lora-rank", "2"]) == 1
    assert "--lora-rank requires peft: pip install 'bertfast[lora]'" in capsys.readouterr().err
    assert main(["predict", "--model-name-or-path", str(adapted[0]), "--input-file", files["test_file"]]) == 1
    assert "is an adapter, which requires peft: pip install 'bertfast[lora]'" in capsys.readouterr().err
