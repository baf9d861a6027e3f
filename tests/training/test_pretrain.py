"""A pre-training run: its results, its output folder, and resuming after interruptions."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from runs import STEPS, assert_same_weights, entries, losses, settings_for
from safetensors import SafetensorError
from safetensors.torch import load_file

from bertfast import BertConfig, BertForPreTraining, encoder
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import Sampling
from bertfast.encoder import pretraining_loss
from bertfast.models import files
from bertfast.runtime import tensor_file
from bertfast.runtime.signals import RunStopped
from bertfast.training import checkpoint
from bertfast.training import step as train_step
from bertfast.training.evaluate import EvaluateSettings, evaluate
from bertfast.training.pretraining import Pretraining, pretrain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """Output folder of an uninterrupted run of twenty steps with dropout."""
    folder = tmp_path_factory.mktemp("finished")
    pretrain(settings_for(folder, data))
    return folder


def signal_at(step: int):
    return lambda done: signal.raise_signal(signal.SIGINT) if done == step else None


def test_pre_training_learns(data, tmp_path):
    metrics = pretrain(settings_for(tmp_path, data, max_steps=500, dropout=0.0))
    assert metrics["validation_loss"] < metrics["unigram_entropy"] - 0.5
    assert metrics["validation_perplexity"] == pytest.approx(np.exp(metrics["validation_loss"]))


@pytest.mark.usefixtures("any_precision_runs")
def test_a_run_with_a_bf16_residual_stream_learns_and_resumes(data, tmp_path):
    options = {"precision": "bf16", "residual_precision": "bf16"}
    pretrain(settings_for(tmp_path / "once", data, **options))
    with pytest.raises(RunStopped):
        pretrain(settings_for(tmp_path / "twice", data, **options), signal_at(7))
    pretrain(settings_for(tmp_path / "twice", data, resume=True, **options))
    assert losses(tmp_path / "twice") == losses(tmp_path / "once")
    assert losses(tmp_path / "once")[-1] < losses(tmp_path / "once")[0]
    assert_same_weights(tmp_path / "once", tmp_path / "twice")


def test_a_precision_without_kernels_is_refused_before_the_first_step(data, tmp_path):
    sizes = "num_hidden_layers=1,hidden_size=96,num_attention_heads=2,intermediate_size=64,max_position_embeddings=32"
    with pytest.raises(ValueError, match=r"with --precision bf16, no fast kernels for .*: pass --precision fp32$"):
        pretrain(settings_for(tmp_path, data, config_overrides=sizes, precision="bf16"))
    assert not entries(tmp_path)


def test_a_bf16_residual_stream_requires_bf16_gemms(data, tmp_path):
    with pytest.raises(ValueError, match=r"--residual-precision bf16 goes with --precision bf16.*precision is fp32"):
        pretrain(settings_for(tmp_path, data, precision="fp32", residual_precision="bf16"))


def test_the_result_opens_in_transformers_with_every_weight(finished, data):
    hf, info = transformers.BertForPreTraining.from_pretrained(finished, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    fused = BertForPreTraining.from_pretrained(finished)
    ids = torch.tensor([[2, 9, 17, 4, 3]])
    assert torch.allclose(hf(ids).prediction_logits, fused(ids).prediction_logits, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished)
    assert len(tokenizer) == fused.config.vocab_size == 128


def test_metrics_have_each_step_once(finished):
    trained = [entry for entry in entries(finished) if "masked_lm_loss" in entry]
    assert [entry["step"] for entry in trained] == list(range(1, STEPS + 1))
    assert {"learning_rate", "tokens_per_second", "next_sentence_accuracy", "gradient_norm"} <= trained[0].keys()
    assert (finished / "loss.png").stat().st_size > 1000


def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_one(finished, data, tmp_path):
    settings = settings_for(tmp_path, data)
    with pytest.raises(RunStopped, match=r"stopped after step 10.*--resume"):
        pretrain(settings, signal_at(10))
    settings = settings.replace(resume=True)
    metrics = pretrain(settings)
    assert_same_weights(finished, tmp_path)
    assert metrics == pytest.approx({name: entries(finished)[-1][name] for name in metrics}, abs=0)
    assert losses(finished) == losses(tmp_path)


def test_a_killed_run_resumes_from_its_last_checkpoint(finished, data, tmp_path):
    settings = settings_for(tmp_path, data, save_steps=4)

    def cut_off(step):
        if step == 11:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pretrain(settings, cut_off)
    settings = settings.replace(resume=True)
    pretrain(settings)
    assert_same_weights(finished, tmp_path)
    steps = [entry["step"] for entry in entries(tmp_path) if "masked_lm_loss" in entry]
    assert steps == list(range(1, STEPS + 1))


def test_a_folder_with_a_run_is_not_overwritten_and_other_settings_do_not_resume_it(finished, data):
    with pytest.raises(ValueError, match="already holds a run: add --resume"):
        pretrain(settings_for(finished, data))
    with pytest.raises(ValueError, match=r"--learning-rate was 0\.01 and is 1\.0: repeat the command of that run with"):
        pretrain(settings_for(finished, data, resume=True, learning_rate=1.0))


def test_a_model_is_replaced_only_on_request_and_never_while_it_is_read(finished, data, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints"))
    short = {"max_steps": 1, "config_overrides": "", "overwrite_output_dir": True}
    with pytest.raises(ValueError, match=r"already holds a model, choose another .*--overwrite-output-dir"):
        pretrain(settings_for(folder, data))
    with pytest.raises(ValueError, match=r"--init-from reads .*config\.json, which would be replaced"):
        pretrain(settings_for(folder, data, init_from=str(folder), **short))
    with pytest.raises(ValueError, match="belongs to `bertfast prepare`: choose another"):
        pretrain(settings_for(data, data))
    with pytest.raises(ValueError, match="--overwrite-output-dir removes the run that --resume and"):
        settings_for(folder, data, resume=True, **short)
    assert_same_weights(finished, folder)
    pretrain(settings_for(folder, data, init_from=str(finished), **short))
    assert [entry["step"] for entry in entries(folder) if "masked_lm_loss" in entry] == [1]
    record = json.loads((folder / "origin.json").read_text())
    assert record["inputs"]["--init-from"]
    assert {"tokenizer", "training text", "--precision", "--seed"} <= record["settings"].keys()


def test_a_run_whose_text_has_changed_is_not_resumed(corpus, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(corpus.read_bytes())
    options = {"train_file": [str(text)], "validation_split_percentage": 20, "processes": 1}
    settings = settings_for(tmp_path / "run", None, vocab_size=128, **options)
    with pytest.raises(RunStopped):
        pretrain(settings, signal_at(7))
    with text.open("a") as file:
        file.write("\n\nA document that was added later.\n")
    trained = "the tokenizer, which is trained on the text, would be another"
    with pytest.raises(ValueError, match=rf"--train-file was .* and is .*; {trained}: .*--data-dir .*data"):
        pretrain(settings.replace(resume=True))
    with pytest.raises(ValueError, match=rf"--train-file was .*; {trained}; --seed was 42 and is 7: choose"):
        pretrain(settings.replace(resume=True, seed=7))
    other = prepare(PrepareSettings(str(tmp_path / "other"), settings.corpus))
    with pytest.raises(ValueError, match=r"tokenizer was .* and is .*--data-dir"):
        pretrain(settings.replace(resume=True, data_dir=str(other), corpus=CorpusSettings()))
    same = CorpusSettings(tokenizer_name=str(tmp_path / "run" / "data"), **options)
    other = prepare(PrepareSettings(str(tmp_path / "same"), same))
    with pytest.raises(ValueError, match=r"(training|validation) text was .*--data-dir"):
        pretrain(settings.replace(resume=True, data_dir=str(other), corpus=CorpusSettings()))
    pretrain(settings.replace(resume=True, data_dir=str(tmp_path / "run" / "data"), corpus=CorpusSettings()))


def test_a_full_disk_keeps_the_previous_checkpoint(data, tmp_path, monkeypatch):
    save = tensor_file.save_file

    def full(tensors, path, metadata):
        if "00000010" in str(path) and path.name == "optimizer.safetensors":
            raise SafetensorError("I/O error: No space left on device")  # as the library says it
        save(tensors, path, metadata)

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        pretrain(settings_for(tmp_path, data))
    folder = tmp_path / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000005"]
    assert checkpoint.read_progress(folder / "step-00000005")[0] == 5


def test_only_the_newest_checkpoints_are_kept(finished):
    kept = checkpoint.checkpoints(finished / "checkpoints")
    assert [path.name for path in kept] == ["step-00000015", "step-00000020"]


def test_a_step_without_a_finite_gradient_is_skipped_and_ten_in_a_row_stop_the_run(data, tmp_path, monkeypatch, caplog):
    bad, calls = set(range(12, 14)) | set(range(20, 60)), iter(range(1000))

    def poisoned(*arguments, **options):
        loss = pretraining_loss(*arguments, **options)
        if next(calls) in bad:  # two calls a step
            loss.masked_lm.data.fill_(torch.nan)
        return loss

    monkeypatch.setattr(train_step, "pretraining_loss", poisoned)
    caplog.set_level("INFO", "bertfast")
    with pytest.raises(
        RunStopped,
        match=r"10 steps in a row, up to step 20, were skipped: .*; lower --learning-rate; the newest checkpoint",
    ):
        pretrain(settings_for(tmp_path, data, max_steps=100))
    assert "skipped (1 so far); --replay 7 computes it again" in caplog.text  # there is a checkpoint of step 5
    skipped = {entry["step"]: entry["skipped"] for entry in entries(tmp_path) if "skipped" in entry}
    assert skipped == {7: 1} | {step: step - 9 for step in range(11, 21)}
    newest = checkpoint.checkpoints(tmp_path / "checkpoints")[-1]
    assert newest.name == "step-00000010"  # none is written while steps are skipped
    assert all(weight.isfinite().all() for weight in load_file(newest / "model.safetensors").values())


def test_a_step_is_the_mean_over_its_tokens_however_it_is_divided(data, tmp_path):
    run = Pretraining(settings_for(tmp_path, data, gradient_accumulation_steps=4))
    batches = [run.plan.batches.bin(0, index) for index in range(4)]
    masked = sum(batch.masked for batch in batches)
    pairs = sum(int((batch.next_sentence_labels >= 0).sum()) for batch in batches)
    losses = [pretraining_loss(run.model, batch, run.train_step.seed) for batch in batches]
    total = sum(loss.masked_lm for loss in losses) / masked + sum(loss.next_sentence for loss in losses) / pairs
    total.backward()
    expected = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    run.model.zero_grad()
    run.train_step.gradients(batches, masked, pairs)
    for name, parameter in run.model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


def test_init_from_loads_a_model_and_extends_its_positions(finished, corpus, tmp_path):
    settings = settings_for(
        tmp_path,
        None,
        corpus=CorpusSettings([str(corpus)], validation_split_percentage=20, processes=1),
        sampling=Sampling(max_seq_length=40),
        config_overrides="",
        init_from=str(finished),
        max_positions=48,
        max_steps=1,
    )
    run = Pretraining(settings)
    before, after = BertForPreTraining.from_pretrained(finished), run.model
    positions = [m.bert.embeddings.position_embeddings.weight for m in (before, after)]
    assert torch.equal(positions[1], torch.cat([positions[0], positions[0][:16]]))
    assert torch.equal(before.cls.predictions.decoder.weight, after.cls.predictions.decoder.weight)
    assert run.corpus.tokenizer.get_vocab() == transformers.AutoTokenizer.from_pretrained(finished).get_vocab()
    run.run(lambda step: None)
    assert BertConfig.from_pretrained(tmp_path).max_position_embeddings == 48


def test_evaluate_scores_a_checkpoint_on_text(finished, corpus, tmp_path, capsys):
    metrics = evaluate(
        EvaluateSettings.of(
            model_name_or_path=str(finished), validation_file=str(corpus), objective="mlm", output_dir=str(tmp_path)
        )
    )
    assert 0 < metrics["validation_loss"] < np.log(128) + 1
    assert 0 <= metrics["next_sentence_accuracy"] <= 1
    assert "validation_perplexity" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval_results.json").read_text()) == metrics


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampling": Sampling(max_seq_length=64), "tokens_per_batch": 128},
            "--max-seq-length 64 is more than the model's 32 positions",
        ),
        ({"config_overrides": "hiden_size=3"}, "'hiden_size' is not a size"),
        ({"config_overrides": "hidden_size=wide"}, "--config-overrides: hidden_size must be an integer, got 'wide'"),
        (
            {"config_overrides": "hidden_size=33"},
            "--config-overrides: hidden_size must be a multiple of",
        ),
        (
            {"config_overrides": "num_hidden_layers=0"},
            "--config-overrides: num_hidden_layers must be a whole",
        ),
        ({"config_overrides": "hidden_act=wide"}, "--config-overrides: hidden_act must name an activation"),
        ({"config_overrides": "layer_norm_eps=nan"}, "--config-overrides: layer_norm_eps must be a number at least 0"),
        ({"config_overrides": "hidden_dropout_prob=0.5"}, "hidden_dropout_prob would have no effect: --dropout"),
        ({"preset": "base", "init_from": "model"}, "--preset and --init-from exclude each other"),
        ({"tokens_per_batch": 8}, "cannot hold a sample"),
        ({"checkpoint_layers": 2}, "--checkpoint-layers must be at most 1, as many as the model has, got 2"),
        ({"init_from": "nowhere/at/all"}, "not a folder"),
        ({"device": "cuda:7"}, "--device cuda:7 is not available"),
        ({"precision": "fp8"}, "auto, fp32, bf16 or fp16"),
    ],
)
def test_contradictory_settings_are_refused_before_any_work(data, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pretrain(settings_for(tmp_path / "run", data, **changes))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_shards_of_another_tokenizer_are_refused(finished, corpus, tmp_path):
    foreign = CorpusSettings([str(corpus)], vocab_size=64, validation_split_percentage=20, processes=1)
    data = prepare(PrepareSettings(str(tmp_path / "data"), foreign))
    with pytest.raises(ValueError, match="another tokenizer"):
        pretrain(settings_for(tmp_path / "run", data, init_from=str(finished), config_overrides=""))


def test_minutes_end_a_run_with_a_learning_rate_of_zero(data, tmp_path):
    pretrain(settings_for(tmp_path, data, minutes=1 / 60, max_steps=0))
    rates = [entry["learning_rate"] for entry in entries(tmp_path) if "learning_rate" in entry]
    assert len(rates) > 3
    assert max(rates) <= 1e-2
    assert rates[-1] < max(rates) / 2


def test_a_causal_model_learns_and_attends_to_no_later_token(data, tmp_path):
    sampling = Sampling(max_seq_length=24, objective="ltr")
    metrics = pretrain(settings_for(tmp_path, data, max_steps=200, dropout=0.0, sampling=sampling))
    assert metrics["validation_loss"] < metrics["unigram_entropy"] - 0.5
    assert "next_sentence_loss" not in metrics
    model, *_ = files.load(BertForPreTraining, tmp_path)
    assert model.config.is_decoder
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 3, 2]])
    first, second = model.bert(ids).last_hidden_state
    torch.testing.assert_close(first[:3], second[:3])
    assert not torch.allclose(first[3:], second[3:])
    packed = encoder.pack(model, ids.view(1, -1), torch.tensor([0, 5, 10], dtype=torch.int32))
    pooled = encoder.pooled(model, encoder.encode(model.bert, packed, packed.first))
    lasts = model.bert.pooler(torch.stack([first[-1], second[-1]])[:, None])
    torch.testing.assert_close(pooled, lasts)
    with pytest.raises(TypeError, match="has extensions that run only on packed batches"):
        model(ids)


def test_parts_of_a_run_that_have_no_step_are_said(data, tmp_path, caplog):
    values = {"max_steps": 3, "second_phase_length": 30, "second_phase_share": 0.01, "batch_ramp": 0.1}
    Pretraining(settings_for(tmp_path, data, gradient_accumulation_steps=4, **values))
    assert "no effect in a run of 3 steps: --batch-ramp and --second-phase-length" in caplog.text
