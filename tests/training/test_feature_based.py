"""A BiLSTM on a frozen encoder."""

import json

import numpy as np
import pytest
import torch
import transformers
from task_examples import settings_for, write_examples

from bertfast import BertForPreTraining, BertForTokenClassification
from bertfast.cli.main import main
from bertfast.encoder import pack, sequence_logits
from bertfast.inference.predict import predict_outputs
from bertfast.models import extensions
from bertfast.models.extensions import LAYERS, BertFeaturesForTokenClassification
from bertfast.models.files import load, read_config, save
from bertfast.training.finetuning import Finetuning, finetune

SMALL = {"strategy": "feature-based", "lstm_size": 16, "num_train_epochs": 4, "learning_rate": 1e-2}


@pytest.mark.parametrize("layers", LAYERS)
def test_cached_hidden_states_equal_those_of_the_encoder(layers, pretrained, tmp_path):
    file = write_examples(tmp_path, "token-classification", 12, seed=0)
    run = Finetuning(
        settings_for("token-classification", pretrained, file, tmp_path / "out", feature_layers=layers, **SMALL)
    )
    features = run.features["train"]
    batch = features.model_inputs(next(run.rows_of_steps()))
    run.model.eval()
    stored = run.task.logits(run.model, batch)
    del batch.arguments["features"]
    torch.testing.assert_close(run.task.logits(run.model, batch), stored, atol=1e-5, rtol=1e-4)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("bert.") for name in trained)


def test_a_feature_based_model_learns_with_a_frozen_encoder_and_opens_again(pretrained, tmp_path, capsys):
    for split, rows in (("train", 240), ("dev", 40)):
        (tmp_path / split).mkdir()
        write_examples(tmp_path / split, "token-classification", rows, seed=rows)
    dev = str(tmp_path / "dev" / "a.conll")
    settings = settings_for(
        "token-classification",
        pretrained,
        tmp_path / "train" / "a.conll",
        tmp_path / "out",
        validation_file=dev,
        **SMALL,
    )
    results = finetune(settings)
    assert results["eval_f1"] > 0.95
    assert not (tmp_path / "out" / ".features").exists()
    model = BertFeaturesForTokenClassification.from_pretrained(tmp_path / "out")
    before = BertForPreTraining.from_pretrained(pretrained).bert.state_dict()
    after = model.bert.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after)
    capsys.readouterr()
    checked = ["--validation-file", dev, "--output-dir", str(tmp_path / "checked")]
    assert main(["evaluate", "--model-name-or-path", str(tmp_path / "out"), "--device", "cpu", *checked]) == 0
    again = json.loads((tmp_path / "checked" / "eval_results.json").read_text())
    assert again["eval_f1"] == pytest.approx(results["eval_f1"], abs=1e-6)


def test_hidden_states_are_recomputed_only_for_other_text_or_another_encoder(pretrained, tmp_path, monkeypatch):
    file, kept = write_examples(tmp_path, "token-classification", 12, seed=0), tmp_path / "kept"

    def run(**changes) -> Finetuning:
        settings = SMALL | {"features_dir": str(kept)} | changes
        return Finetuning(settings_for("token-classification", pretrained, file, tmp_path / "out", **settings))

    first = run().features["train"].inputs["features"]
    with monkeypatch.context() as changed:
        changed.delattr(BertFeaturesForTokenClassification, "features")
        again = run(lstm_size=8, seed=3).features["train"].inputs["features"]
    np.testing.assert_array_equal(first, again)
    (cache,) = kept.glob("*.npy")
    whole = cache.read_bytes()
    for damaged in (b"", b"3", whole[:-100], whole.replace(b"12", b"13", 1)):
        cache.unlink()  # not overwritten, as arrays are mapped from it
        cache.write_bytes(damaged)
        np.testing.assert_array_equal(first, run().features["train"].inputs["features"])
    run(feature_layers="embeddings")
    run(random_init=True)
    (tmp_path / "more").mkdir()
    file = write_examples(tmp_path / "more", "token-classification", 13, seed=0)
    run()
    assert len([*kept.iterdir()]) == 4


def test_other_tasks_have_no_feature_based_model(pretrained, tmp_path):
    file = write_examples(tmp_path, "sequence-classification", 8, seed=0)
    with pytest.raises(ValueError, match="--strategy feature-based is only available for token classification"):
        Finetuning(settings_for("sequence-classification", pretrained, file, tmp_path / "out", **SMALL))
    config = read_config(pretrained, feature_layers="last")
    with pytest.raises(TypeError, match="has extensions that run only on packed batches"):
        BertFeaturesForTokenClassification(config)(torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    "kind", ["sequence-classification", "multiple-choice", "question-answering", "token-classification"]
)
def test_a_bilstm_reads_each_sequence_separately(kind, pretrained, tmp_path):
    """Packed together or one by one, and again when the model is opened."""
    file = write_examples(tmp_path, kind, 24, seed=0)
    settings = settings_for(kind, pretrained, file, tmp_path / "out", bilstm=True, num_train_epochs=8)
    run = Finetuning(settings)
    run.run(lambda step: None)
    assert np.mean(run.results.losses[-4:]) < np.mean(run.results.losses[:4])
    model = type(run.model).from_pretrained(tmp_path / "out")
    assert model.bilstm is not None
    outputs = []
    for budget in (1, 10**6):
        run.task.settings = run.task.settings.replace(eval_tokens=budget)
        outputs.append(predict_outputs(run.task, model, run.features["train"]))
    for alone, together in zip(*outputs, strict=True):
        np.testing.assert_allclose(alone, together, atol=1e-5)


def test_a_bilstm_does_not_change_padding_slots(pretrained):
    model = extensions.BertForSequenceClassification(read_config(pretrained, bilstm=True)).eval()
    ids = torch.tensor([[5, 6, 7, 8, 6, 7, 8, 0]])  # and a slot that is in no sequence

    def logits(*starts: int) -> torch.Tensor:
        return sequence_logits(model, pack(model, ids[:, : max(starts[-1], 4)], torch.tensor(starts)))

    together = sequence_logits(model, pack(model, ids, torch.tensor([0, 4, 7, 7])))
    assert together.isfinite().all()
    torch.testing.assert_close(together[:1], logits(0, 4))


def test_transformers_refuses_models_with_extensions(pretrained, tmp_path):
    """It would drop their weights otherwise."""
    config = read_config(pretrained, bilstm=True)
    save(extensions.BertForTokenClassification(config), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["bilstm"]
    for kind in (transformers.AutoModelForTokenClassification, transformers.BertForTokenClassification):
        with pytest.raises((ValueError, OSError), match=r"does not recognize this architecture|no file named"):
            kind.from_pretrained(tmp_path)


def test_a_folder_without_the_model_type_of_extensions_opens(pretrained, tmp_path):
    model = extensions.BertForTokenClassification(read_config(pretrained, bilstm=True)).eval()
    save(model, tmp_path)
    (tmp_path / "model.bertfast.safetensors").rename(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "bert"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened, missing, unexpected = load(BertForTokenClassification, tmp_path)
    assert not missing
    assert not unexpected
    for name, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name


def test_a_sharded_model_with_extensions_opens_again(tmp_path):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 64,
    }
    model = extensions.BertForSequenceClassification(extensions.ExtendedBertConfig(**sizes, bilstm=True))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    again = extensions.BertForSequenceClassification.from_pretrained(tmp_path)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("training", [False, True])
def test_autocast_rounds_no_logits_in_evaluation(training, pretrained):
    config = read_config(pretrained, feature_layers="last", lstm_size=8, num_labels=3)
    model = BertFeaturesForTokenClassification(config).train(training)
    packed = pack(model, torch.tensor([[5, 6, 7, 8]]), torch.tensor([0, 4]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(packed, torch.randn(4, 1, config.hidden_size))
    assert logits.dtype == (torch.bfloat16 if training else torch.float32)
