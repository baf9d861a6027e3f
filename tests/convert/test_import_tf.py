"""`bertfast import` converts checkpoints that TensorFlow wrote, and refuses damaged ones."""

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from parity import SIZES
from tensorflow_checkpoint import message, original_name, tensors_of, write_bundle, write_index

import bertfast
from bertfast.cli.main import main
from bertfast.convert import tensor_bundle
from bertfast.convert.tensor_bundle import read_tensors
from bertfast.data.tokenizer import load_tokenizer

# TensorFlow has an environment of its own, because its requirements conflict with those of the tests.
TENSORFLOW = Path(os.environ.get("TENSORFLOW_PYTHON", Path("build", "tensorflow", "bin", "python").absolute()))
needs_tensorflow = pytest.mark.skipif(not TENSORFLOW.exists(), reason="`make build/tensorflow` installs TensorFlow")
WRITE = """
import sys
import numpy as np
import tensorflow as tf

source, prefix = sys.argv[1:]
graph = tf.Graph()
with graph.as_default(), tf.compat.v1.Session() as session:
    for name, value in np.load(source).items():
        tf.compat.v1.get_variable(name, initializer=value)
    session.run(tf.compat.v1.global_variables_initializer())
    tf.compat.v1.train.Saver().save(session, prefix, write_meta_graph=False)
"""


def write_checkpoint(model: torch.nn.Module, folder: Path) -> str:
    """Write a checkpoint with the weights of a transformers model and training state, and return its prefix."""
    tensors = {"global_step": np.int64(7)}
    for name, parameter in model.named_parameters():
        if "decoder" not in name:
            original, transposed = original_name(name)
            tensors[original] = parameter.detach().T.numpy() if transposed else parameter.detach().numpy()
            tensors[f"{original}/adam_m"] = np.zeros(parameter.shape, np.float32)
    np.savez(folder / "tensors.npz", **tensors)
    prefix = str(folder / "bert_model.ckpt")
    ran = subprocess.run(
        [str(TENSORFLOW), "-c", WRITE, str(folder / "tensors.npz"), prefix], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    config = {name: value for name, value in model.config.to_dict().items() if name in SIZES and name != "num_labels"}
    (folder / "bert_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    return prefix


@pytest.mark.slow
@needs_tensorflow
@pytest.mark.parametrize(
    "name", ["BertForPreTraining", "BertForMaskedLM", "BertForSequenceClassification", "BertModel"]
)
def test_a_tensorflow_checkpoint_is_converted_to_the_class_of_its_heads(name, tmp_path, capsys):
    torch.manual_seed(0)
    # Large enough that the index has several blocks, and keys with shared prefixes.
    hf = getattr(transformers, name)(transformers.BertConfig(**SIZES | {"num_hidden_layers": 12})).eval()
    prefixed = torch.nn.ModuleDict({"bert": hf}) if name == "BertModel" else hf
    prefixed.config = hf.config
    prefix = write_checkpoint(prefixed, tmp_path)
    assert main(["import", prefix, str(tmp_path / "out")]) == 0
    assert f"holds a {name} of" in capsys.readouterr().out
    assert (tmp_path / "out" / "vocab.txt").is_file()
    ids = torch.arange(22).view(2, 11)
    converted = getattr(bertfast, name).from_pretrained(tmp_path / "out")
    opened, info = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for result in (converted(ids), opened(ids)):
        torch.testing.assert_close(result[0], hf(ids)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@needs_tensorflow
def test_damaged_checkpoints_and_wrong_configs_are_refused(tmp_path, capsys):
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    prefixed = torch.nn.ModuleDict({"bert": model})
    prefixed.config = model.config
    prefix = write_checkpoint(prefixed, tmp_path)

    def refused(*more: str) -> str:
        assert main(["import", prefix, str(tmp_path / "out"), *more]) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    config = tmp_path / "bert_config.json"
    kept = config.read_text()
    config.write_text(json.dumps(json.loads(kept) | {"num_hidden_layers": 3}))
    assert "lacks weights: encoder.layer.2." in refused()
    config.write_text(json.dumps(json.loads(kept) | {"num_hidden_layers": 1}))
    assert "has unexpected weights: encoder.layer.1." in refused()
    config.write_text(json.dumps(json.loads(kept) | {"hidden_size": 96}))
    assert "do not have the shapes that" in refused()
    config.write_text(kept)
    data = tmp_path / "bert_model.ckpt.data-00000-of-00001"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    assert "data-00000-of-00001 is damaged" in refused()
    data.write_bytes(b"\xef\xbb\xbf" + whole)
    assert f"it has {len(whole) + 3} of {len(whole)} bytes" in refused()
    data.unlink()
    assert "is missing, although" in refused()
    index = tmp_path / "bert_model.ckpt.index"
    index.write_bytes(index.read_bytes()[:-20])
    assert "is damaged or not the index" in refused()
    config.unlink()
    assert "with --bert-config" in refused()


def write_small(name: str, folder: Path, vocabulary: str = "[PAD] [UNK] [CLS] [SEP] [MASK] The the a é", **changes):
    """Write a small model of transformers as a checkpoint with training state; return the model and the prefix."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.BertConfig(**SIZES | changes)).eval()
    tensors = tensors_of(model)
    pooler = torch.nn.ModuleDict(
        {"bert": torch.nn.ModuleDict({"pooler": torch.nn.ModuleDict({"dense": model_pooler()})})}
    )
    tensors = tensors_of(pooler) | tensors  # TensorFlow's BERT always has a pooler
    slots = ("adam_m", "adam_v", "Adam", "Adam_1", "AdamWeightDecayOptimizer", "Momentum", "ExponentialMovingAverage")
    state = {f"{weight}/{slot}": array for weight, array in tensors.items() for slot in (*slots, "lamb_m", "lamb_v_1")}
    for scalar in ("beta1_power", "beta2_power", "loss_scale", "current_loss_scale", "cond/beta1_power"):
        state[scalar] = np.float32(0.9).reshape(())
    for counter in ("global_step", "good_steps", "num_good_steps"):
        state[counter] = np.int64(7).reshape(())
    state["signal_early_stopping/STOP"] = np.array(False)
    config = {key: value for key, value in model.config.to_dict().items() if key in SIZES and key != "num_labels"}
    (folder / "bert_config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    (folder / "vocab.txt").write_text("\n".join(vocabulary.split()) + "\n", encoding="utf-8")
    return model, write_bundle(folder / "model.ckpt-7", tensors | state)


def model_pooler() -> torch.nn.Module:
    return torch.nn.Linear(SIZES["hidden_size"], SIZES["hidden_size"])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("BertForQuestionAnswering", {"num_labels": 2}),
        ("BertForSequenceClassification", {"num_labels": 3}),
        ("BertForSequenceClassification", {"num_labels": 1}),
        ("BertForMaskedLM", {}),
        ("BertForNextSentencePrediction", {}),
    ],
)
def test_heads_of_fine_tuning_are_converted_and_training_state_is_left_out(name, changes, tmp_path, capsys):
    hf, prefix = write_small(name, tmp_path, **changes)
    assert main(["import", prefix, str(tmp_path / "out")]) == 0
    assert f"holds a {name} of" in capsys.readouterr().out
    opened, info = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    for key, value in hf.state_dict().items():
        assert torch.equal(opened.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("flags", "cased"), [([], True), (["--casing", "cased"], True), (["--casing", "uncased"], False)]
)
def test_an_imported_tokenizer_is_the_same_in_both_libraries(flags, cased, tmp_path):
    prefix = write_small("BertForMaskedLM", tmp_path)[1]
    assert main(["import", prefix, str(tmp_path / "out"), *flags]) == 0
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = load_tokenizer(tmp_path / "out").encode("The the é").ids
    assert hf("The the é")["input_ids"] == expected
    assert expected == ([2, 5, 6, 8, 3] if cased else [2, 6, 6, 1, 3])
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    }


def test_a_vocabulary_of_another_model_is_refused_before_anything_is_written(tmp_path, capsys):
    words = " ".join(f"w{i}" for i in range(SIZES["vocab_size"]))
    prefix = write_small("BertForMaskedLM", tmp_path, f"[PAD] [UNK] [CLS] [SEP] [MASK] {words}")[1]
    assert main(["import", prefix, str(tmp_path / "out")]) == 1
    assert "they do not belong together" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def damage(path: Path, position: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def test_the_tensor_that_is_damaged_is_named(tmp_path, capsys):
    prefix = write_small("BertForMaskedLM", tmp_path)[1]
    tensors = read_tensors(prefix)
    ends = np.cumsum([tensors[name].nbytes for name in sorted(tensors)])
    for name in ("bert/embeddings/word_embeddings", "bert/encoder/layer_0/output/dense/kernel"):
        data = Path(f"{prefix}.data-00000-of-00001")
        whole = data.read_bytes()
        damage(data, int(ends[sorted(tensors).index(name)]) - 1)
        assert main(["import", prefix, str(tmp_path / "out")]) == 1
        assert (
            f"{data} is damaged, copy or download it again: the checksum of {name} is wrong" in capsys.readouterr().err
        )
        assert not (tmp_path / "out").exists()
        data.write_bytes(whole)


def test_an_index_of_which_one_bit_is_damaged_is_refused(tmp_path):
    prefix = write_bundle(tmp_path / "x", {"name": np.zeros(3, np.float32)})
    damage(Path(f"{prefix}.index"), 20)
    with pytest.raises(ValueError, match=r"x\.index is damaged .*: the checksum of a block is wrong"):
        read_tensors(prefix)


@pytest.mark.parametrize("checksums", [True, False])  # without them, damage reaches the parser
def test_a_damaged_index_is_refused_without_a_traceback(checksums, tmp_path, monkeypatch):
    if not checksums:
        monkeypatch.setattr(tensor_bundle, "_require_block_checksum", lambda *_: None)
        monkeypatch.setattr(tensor_bundle, "_require_checksum", lambda *_: None)
    prefix = write_small("BertForMaskedLM", tmp_path)[1]
    index = Path(f"{prefix}.index")
    whole = index.read_bytes()
    generator = np.random.default_rng(0)
    for number in range(150):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole) if number % 3 else 2000, 1 + number % 4):
            damaged[position] = generator.integers(256)
        index.write_bytes(damaged[: len(damaged) - number % 5])
        with suppress(FileNotFoundError, ValueError):
            read_tensors(prefix)


@pytest.mark.parametrize(
    "entry",
    [
        message((1, 1), (2, message((2, message((1, 2**62))))), (5, 2**64 - 1)),
        message((1, 1), (2, message((2, message((1, 2**40))), (2, message((1, 2**40))))), (5, 2**63)),
        message((1, 1), (3, 2**40), (5, 4)),
        message((1, b"x"), (5, 4)),
        message((1, 1), (2, 7)),
    ],
)
def test_absurd_sizes_in_an_index_are_refused(entry, tmp_path):
    write_bundle(tmp_path / "x", {"name": np.zeros(3, np.float32)})
    write_index(tmp_path / "x", {"": message((1, 1)), "name": entry})
    with pytest.raises(ValueError, match="name"):
        read_tensors(tmp_path / "x")


def test_a_checkpoint_of_tensorflow_2_objects_is_refused(tmp_path):
    prefix = write_bundle(tmp_path / "x", {"_CHECKPOINTABLE_OBJECT_GRAPH": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="a checkpoint of TensorFlow 2 objects"):
        read_tensors(prefix)


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="without its suffix"):
        read_tensors(tmp_path / "bert_model.ckpt")


def test_the_config_of_the_model_can_be_in_another_folder(tmp_path, capsys):
    arguments = ["import", str(tmp_path / "bert_model.ckpt"), str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "name a TensorFlow checkpoint without its suffix" in capsys.readouterr().err
    (tmp_path / "bert_model.ckpt.index").touch()
    assert main(arguments) == 1
    assert "name the model's bert_config.json with --bert-config" in capsys.readouterr().err
    config = tmp_path / "elsewhere.json"
    config.write_text(json.dumps({"hidden_size": 64}))
    assert main([*arguments, "--bert-config", str(config)]) == 1
    assert "bert_model.ckpt.index is damaged" in capsys.readouterr().err
