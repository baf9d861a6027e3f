"""`bench.end_to_end.learning_per_minute`: both sides learn from the same weights, are measured alike and on time."""

import json
import lzma
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from bench.end_to_end import learning_per_minute, run_mlm
from bench.end_to_end.learning_curve import POINTS, Curve, HeldOut
from bench.end_to_end.learning_per_minute import RECIPES, Recipe, Run
from bench.figures import fingerprint, inputs_of
from bench.page import learning
from bench.page.rows import Result
from bertfast import BertForPreTraining, preset_config
from bertfast.cli.flags import parse
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.training.pretrain_settings import PretrainSettings

ROOT = Path(__file__).parents[1]
WORDS = [
    "river",
    "house",
    "old",
    "wide",
    "cold",
    "film",
    "plot",
    "town",
    "king",
    "road",
    "winter",
    "letter",
    "garden",
    "bread",
    "stone",
]


class Constant:
    """A replacement of `HeldOut` that takes a while, and may interrupt the run at one of its points."""

    def __init__(self, seconds: float = 0.0, interrupt_at: int | None = None):
        self.seconds, self.interrupt_at, self.calls = seconds, interrupt_at, 0

    def losses(self, weights) -> dict[str, float]:
        assert "bert.embeddings.word_embeddings.weight" in weights
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        time.sleep(self.seconds)
        return {"sentences": 1.0}


def write_text(folder: Path) -> Path:
    """Write documents of a small language under the names of Wikipedia's files; return the folder of the data."""
    (folder / "corpus").mkdir(parents=True)
    for split, documents in (("train-00", 300), ("train-01", 300), ("valid", 60)):
        lines = [
            [f"the {WORDS[(n + i) % 13]} of the {WORDS[n % 13]} was {WORDS[i % 13]} ." for i in range(12)]
            for n in range(documents)
        ]
        with lzma.open(folder / "corpus" / f"wikipedia-{split}.txt.xz", "wt", encoding="utf-8") as file:
            file.write("\n\n".join("\n".join(document) for document in lines))
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Run:
    """What both sides train on, with a tiny model."""
    pytest.importorskip("accelerate")
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("learning")
    files = learning_per_minute.files_of(write_text(folder) / "corpus", "wikipedia", "train")
    valid = learning_per_minute.files_of(folder / "corpus", "wikipedia", "valid")
    corpus = CorpusSettings(list(map(str, files)), list(map(str, valid)), vocab_size=128, processes=1)
    shards = prepare(PrepareSettings(str(folder / "data"), corpus))
    initial = learning_per_minute.initial_model(folder / "initial", shards, "tiny", 3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(initial)
    chunks = run_mlm.prepare_chunks({"train": files, "validation": valid}, tokenizer, 128, folder / "chunks")
    sets = {
        "sentences": learning_per_minute.sentences(shards),
        "chunks": learning_per_minute.masked(chunks["validation"], tokenizer),
    }
    return Run(folder / "run", 3, shards, initial, tokenizer, chunks["train"], HeldOut(initial, sets))


def trained(recipe: Recipe, inputs: Run, folder: Path, held_out: Constant) -> Curve:
    train = learning_per_minute.train_bertfast if recipe.side == "bertfast" else learning_per_minute.train_transformers
    return train(
        recipe, Run(folder, inputs.seed, inputs.shards, inputs.initial, inputs.tokenizer, inputs.chunks, held_out)
    )


SIDES = {
    "transformers": Recipe(0.03, None, {"learning_rate": 1e-3, "per_device_train_batch_size": 4}, 0.1, "fp32"),
    "bertfast": Recipe(0.03, "--learning-rate 0.001 --tokens-per-batch 512 --save-steps 1", precision="fp32"),
}


@pytest.mark.slow
def test_both_sides_learn_in_the_stated_time_and_are_measured_on_the_same_tokens(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("datasets")
    folders = [str(write_text(tmp_path / "data")), f"--output={tmp_path / 'out'}", f"--results={tmp_path}"]
    options = ["--minutes=0.05", "--preset=tiny", "--seeds", "2", "--precision=fp32"]
    runs = ["transformers-adamw-0.001", "bertfast-adamw-0.001"]
    command = [sys.executable, "-m", "bench.end_to_end.learning_per_minute", *folders, *runs, *options]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    files = [tmp_path / f"learning_per_minute-wikipedia-{name}-0.05-minutes-seed-2.json" for name in runs]
    results = [json.loads(file.read_text()) for file in files]
    for side, result in zip(("transformers", "bertfast"), results, strict=True):
        assert (result["side"], result["precision"], result["minutes"]) == (side, "fp32", 0.05)
        assert {"commit", "processor", "threads", "versions"} <= result["origin"].keys()
        first, *_, last = result["curve"]
        assert 3 <= last["seconds"] < 5
        assert all(last[text] < first[text] for text in ("sentences", "chunks"))
        assert 0 < result["tokens"] <= result["steps"] * 2048
        assert result["tokens"] > 0.8 * result["steps"] * 2048
    assert results[0]["validation"] == results[1]["validation"]
    assert results[0]["validation"]["chunks"]["masked"] > 100
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.stdout.count("there is a result, so it is not repeated") == 2


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_measuring_is_outside_of_the_clock(side, inputs, tmp_path):
    held_out, started = Constant(seconds=0.2), time.perf_counter()
    curve = trained(SIDES[side], inputs, tmp_path, held_out)
    elapsed = time.perf_counter() - started
    assert held_out.calls == len(curve.points) >= 3
    assert 1.8 <= curve.points[-1]["seconds"] < elapsed - 0.2 * held_out.calls


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_an_interrupted_run_continues_with_its_clock_and_its_points(side, inputs, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(SIDES[side], inputs, tmp_path, Constant(interrupt_at=4))
    lines = (tmp_path / "curve" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    held_out, started = Constant(), time.perf_counter()
    curve = trained(SIDES[side], inputs, tmp_path, held_out)
    steps, seconds, tokens = ([point[key] for point in curve.points] for key in ("step", "seconds", "tokens"))
    assert [json.dumps(point) for point in curve.points[:3]] == lines
    assert held_out.calls == len(curve.points) - 3
    assert steps == sorted(set(steps))
    assert seconds == sorted(seconds)
    assert tokens == sorted(tokens)
    assert 1.8 <= seconds[-1] < 2.8
    assert seconds[-1] - seconds[2] < time.perf_counter() - started
    finished = Constant()
    assert trained(SIDES[side], inputs, tmp_path, finished).points == curve.points
    assert finished.calls == 0


@pytest.mark.slow
def test_the_learning_rate_of_transformers_rises_and_falls_with_the_time(inputs, tmp_path):
    rates = []

    class Noting(Constant):
        def losses(self, weights):
            rates.append((clock.fraction_done, trainer.lr_scheduler.get_last_lr()[0]))
            return super().losses(weights)

    curve = Curve(tmp_path / "curve", Noting(), 2.0, 0)
    clock = run_mlm.Clock(curve, 512, 0.0)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=10**6, use_cpu=True, report_to="none", learning_rate=0.01
    )
    model = transformers.BertForMaskedLM.from_pretrained(inputs.initial)
    collator = transformers.DataCollatorForLanguageModeling(inputs.tokenizer)
    trainer = run_mlm.TimedTrainer(
        clock, 0.5, model=model, args=arguments, train_dataset=inputs.chunks, data_collator=collator
    )
    trainer.train()
    for fraction, rate in rates:
        assert rate == pytest.approx(0.01 * min(fraction, 1 - fraction) / 0.5, abs=0.002)
    assert max(rate for _, rate in rates) > 0.007


def test_the_loss_is_that_of_transformers_for_models_with_and_without_further_heads(inputs):
    torch.manual_seed(1)
    model = BertForPreTraining(preset_config("tiny", vocab_size=128)).eval()
    plain = transformers.BertForMaskedLM(model.config).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    found = inputs.held_out.losses(model.state_dict())
    assert inputs.held_out.losses(plain.state_dict()) == found
    for name, batches in inputs.held_out.sets.items():
        sums, masked = 0.0, 0
        for rows in batches:
            with torch.no_grad():
                logits = plain(**{key: x for key, x in rows.items() if key != "labels"}).logits
            flat = rows["labels"].flatten()
            sums += torch.nn.functional.cross_entropy(logits.flatten(0, 1), flat, reduction="sum").item()
            masked += int((flat != IGNORE_INDEX).sum())
        assert found[name] == pytest.approx(sums / masked, rel=1e-5)
        assert inputs.held_out.described()[name]["masked"] == masked
    weights = plain.state_dict()
    del weights["cls.predictions.transform.dense.weight"]
    with pytest.raises(ValueError, match=r"has no cls\.predictions\.transform\.dense\.weight"):
        inputs.held_out.losses(weights)


def test_the_validation_tokens_are_the_same_in_every_call_and_masked_as_in_training(inputs):
    again = HeldOut(inputs.initial, {"sentences": learning_per_minute.sentences(inputs.shards)})
    described = inputs.held_out.described()
    assert again.described()["sentences"] == described["sentences"]
    assert described["sentences"]["sha256"] != described["chunks"]["sha256"]
    special = torch.tensor(
        [inputs.tokenizer.cls_token_id, inputs.tokenizer.sep_token_id, inputs.tokenizer.pad_token_id]
    )
    for name, batches in inputs.held_out.sets.items():
        maskable = sum(int((~torch.isin(rows["input_ids"], special)).sum()) for rows in batches)
        assert 0.13 < described[name]["masked"] / maskable < 0.17


def test_points_are_taken_at_equal_times_and_at_the_end(tmp_path):
    weights = {"bert.embeddings.word_embeddings.weight": torch.zeros(1)}
    curve = Curve(tmp_path, Constant(), 12.0, 0)
    for step in range(1, 25):
        curve.add_if_due(step, 10 * step, step / 2, lambda: weights)
    assert len(curve.points) == POINTS == 12
    assert [point["seconds"] for point in curve.points] == [*range(1, 12), 12.0]
    assert curve.is_complete
    shorter = Curve(tmp_path, Constant(), 12.0, 9)
    assert [point["step"] for point in shorter.points] == [2, 4, 6, 8]
    assert not shorter.is_complete
    assert Curve(tmp_path, Constant(), 12.0, 0).points == []


def test_one_long_step_does_not_lose_the_end_of_the_curve(tmp_path):
    curve = Curve(tmp_path, Constant(), 12.0, 0)
    weights = {"bert.embeddings.word_embeddings.weight": torch.zeros(1)}
    assert curve.add_if_due(1, 10, 13.0, lambda: weights)
    assert curve.is_complete


def test_lines_are_joined_and_cut_into_chunks_without_the_rest():
    columns = {"input_ids": [[1, 2, 3], [], [4, 5], [6, 7]], "mask": [[1, 0, 1], [], [1, 1], [1, 0]]}
    assert run_mlm.cut(columns, 3) == {"input_ids": [[1, 2, 3], [4, 5, 6]], "mask": [[1, 0, 1], [1, 1, 1]]}
    assert run_mlm.cut(columns, 8) == {"input_ids": [], "mask": []}


def test_chunks_contain_the_special_tokens_of_every_line(inputs):
    ids = inputs.chunks[0]["input_ids"]
    assert len(ids) == 128
    assert ids[0] == inputs.tokenizer.cls_token_id
    starts = [index for index, token in enumerate(ids) if token == inputs.tokenizer.cls_token_id]
    assert len(starts) > 5
    assert all(ids[index - 1] == inputs.tokenizer.sep_token_id for index in starts[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "quickest"], "unknown run 'quickest': choose from 'transformers-adamw-0.0005'"),
        (["nowhere"], "nothing to run: name one of transformers-adamw-0.0005"),
        (["nowhere", "--name", "fast"], "--name and --flags go together"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["learning_per_minute", *arguments, "--output", "out"])
    with pytest.raises(SystemExit):
        learning_per_minute.parse_arguments()
    assert message in capsys.readouterr().err


def test_a_missing_text_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"has no books-train\*\.txt\.xz: .*--text"):
        learning_per_minute.files_of(tmp_path, "books", "train")


def test_a_recipe_of_your_own_and_the_precision_are_taken_from_the_flags(monkeypatch):
    flags = ["data", "--output", "out", "--name", "mine", "--flags=--schedule cosine", "--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", ["learning_per_minute", *flags])
    assert learning_per_minute.parse_arguments().recipes == {
        "bertfast-mine": Recipe(20, "--schedule cosine", precision="fp32")
    }


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.side == "bertfast"])
def test_recipes_of_bertfast_have_valid_flags(name, inputs):
    settings = learning_per_minute.pretrain_settings(replace(RECIPES[name], precision="fp32"), inputs)
    assert settings.optimizer.optimizer == name.split("-")[1]
    assert settings.duration.minutes == RECIPES[name].minutes


@pytest.mark.parametrize("rate", learning_per_minute.RATES)
def test_both_sides_of_the_same_recipe_have_the_same_hyperparameters(rate, inputs):
    own = replace(RECIPES[f"bertfast-adamw-{rate:g}"], precision="fp32")
    settings = learning_per_minute.pretrain_settings(own, inputs)
    recipe = RECIPES[f"transformers-adamw-{rate:g}"]
    options, optimizer = transformers.TrainingArguments(output_dir="out", **recipe.options), settings.optimizer
    assert options.learning_rate == optimizer.learning_rate == rate
    assert options.weight_decay == optimizer.weight_decay
    assert (options.adam_beta1, options.adam_beta2) == (optimizer.adam_beta1, optimizer.adam_beta2)
    assert options.max_grad_norm == optimizer.max_grad_norm
    assert recipe.warmup == optimizer.warmup_ratio
    assert optimizer.schedule == "linear"
    assert options.per_device_train_batch_size * 128 == settings.batch.tokens_per_batch
    config = transformers.AutoConfig.from_pretrained(inputs.initial)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == settings.model.dropout
    assert transformers.DataCollatorForLanguageModeling(inputs.tokenizer).mlm_probability == pytest.approx(
        settings.sampling.mlm_probability
    )


def test_the_recipe_for_cpus_is_the_one_chosen(inputs):
    recipe = parse("pretrain", PretrainSettings, ["--config", "cpu", "--output-dir", "x"])
    run = learning_per_minute.pretrain_settings(replace(RECIPES[learning_per_minute.CHOSEN], precision="bf16"), inputs)
    assert recipe.optimizer == run.optimizer
    assert recipe.batch == run.batch
    assert (recipe.sampling, recipe.duration) == (run.sampling, run.duration)
    assert (recipe.model.dropout, recipe.model.preset) == (run.model.dropout, "mini")


def result_of(recipe: str, seed: int, losses: tuple[float, float], minutes: float = 60, **changes) -> Result:
    """Return a result file whose curve ends at these losses on "sentences" and "chunks"."""
    points = [
        {"step": 10 * n, "tokens": n, "seconds": n, "sentences": losses[0] + 2 - n, "chunks": losses[1] + 2 - n}
        for n in (1, 2)
    ]
    sizes = {"masked": 1234, "sha256": "00"}
    values = {
        "origin": {"processor": "one (avx512f)", "threads": 2}, "recipe": recipe, "side": recipe.split("-")[0],
        "text": "wikipedia", "minutes": minutes, "precision": "bf16", "preset": "mini", "seed": seed, "tokens": 2e6,
        "tokens_per_second": 1234.4, "validation": {"sentences": sizes, "chunks": sizes}, "curve": points,
    }  # fmt: skip
    return Result(f"avx512/learning_per_minute-{recipe}-{minutes}-{seed}.json", values | changes)


def test_the_page_says_which_losses_are_reached_in_less_time(tmp_path):
    results = [
        result_of("transformers-adamw-0.001", 1, (4.0, 4.2)),
        result_of("transformers-adamw-0.001", 2, (4.2, 4.4)),
        result_of("transformers-adamw-0.002", 1, (4.5, 4.6)),
        result_of("transformers-defaults", 1, (6.0, 6.0), precision="fp32"),
        result_of("bertfast-adamw-0.001", 1, (4.05, 4.35), 30),
        result_of("bertfast-muon", 1, (3.9, 4.2), 20),
    ]
    text = learning.learning_text(results, tmp_path)
    assert (
        "| wikipedia | transformers-adamw-0.001, 60 min | bf16 | 1, 2 | 2.0 | 1,234 | 4.100 ± 0.141 | 4.300 ± 0.141 |"
        in text
    )
    compared = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n| compared")[1].splitlines()[2:]
    ]
    answers = {
        (cells[0], cells[1].split(":")[0], cells[2].split(":")[0]): cells[3] for cells in compared if len(cells) == 4
    }
    best = "the best of 2 learning rates of transformers"
    assert answers == {
        ("the same recipe", "transformers-adamw-0.001, 60 min", "bertfast-adamw-0.001, 30 min"): "on sentences only",
        (best, "transformers-adamw-0.001, 60 min", "bertfast-muon, 20 min"): "yes",
        ("transformers' defaults", "transformers-defaults, 60 min", "bertfast-muon, 20 min"): "yes",
    }
    assert "masked tokens: wikipedia 1,234 in sentences and 1,234 in chunks" in text
    assert learning.learning_text([], tmp_path) == ""


def test_losses_on_other_masked_tokens_are_not_compared():
    other = {"sentences": {"masked": 1234, "sha256": "00"}, "chunks": {"masked": 1234, "sha256": "11"}}
    results = [result_of("bertfast-muon", 1, (4, 4)), result_of("bertfast-muon", 2, (4, 4), validation=other)]
    with pytest.raises(ValueError, match=r"bertfast-muon-60-2\.json was measured on other masked tokens"):
        learning.groups_of(results)


def test_the_curves_are_drawn_with_the_results_that_they_show(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    (tmp_path / "avx512").mkdir()
    results = [result_of("transformers-adamw-0.001", 1, (4, 4)), result_of("bertfast-muon", 1, (4, 4), 20)]
    assert learning.draw_curves(results, tmp_path) == [tmp_path / "avx512" / "learning_per_minute.png"]
    assert set(inputs_of(tmp_path / "avx512" / "learning_per_minute.png")) == {
        fingerprint(result.values) for result in results
    }
    assert "(../bench/results/avx512/learning_per_minute.png)" in learning.learning_text(results, tmp_path)
    assert learning.draw_curves([], tmp_path) == []
