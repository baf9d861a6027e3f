"""`bertfast import` converts checkpoints that TensorFlow wrote, and refuses damaged ones."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from parity import SIZES

import bertfast
from bertfast.cli.main import main
from bertfast.convert.tensor_bundle import read_tensors

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


def original_name(name: str) -> tuple[str, bool]:
    """Return the TensorFlow name of a PyTorch parameter, and whether it is transposed."""
    name = name.replace(".layer.", ".layer_")
    name = name.removesuffix(".weight") if "_embeddings" in name else name
    for pytorch, tensorflow in (
        ("cls.predictions.bias", "cls.predictions.output_bias"),
        ("cls.seq_relationship.weight", "cls.seq_relationship.output_weights"),
        ("cls.seq_relationship.bias", "cls.seq_relationship.output_bias"),
        ("classifier.weight", "output_weights"),
        ("classifier.bias", "output_bias"),
        ("LayerNorm.weight", "LayerNorm.gamma"),
        ("LayerNorm.bias", "LayerNorm.beta"),
    ):
        name = name.replace(pytorch, tensorflow)
    transposed = name.endswith(".weight")
    return (name.removesuffix("weight") + "kernel" if transposed else name).replace(".", "/"), transposed


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
    data.write_bytes(data.read_bytes()[:-100])
    assert "the data file is damaged" in refused()
    data.unlink()
    assert "is missing, although" in refused()
    index = tmp_path / "bert_model.ckpt.index"
    index.write_bytes(index.read_bytes()[:-20])
    assert "is damaged or not the index" in refused()
    config.unlink()
    assert "with --bert-config" in refused()


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
