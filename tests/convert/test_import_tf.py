"""Google's original checkpoints, as TensorFlow writes them, become models; and what is damaged is refused."""

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

# TensorFlow is in an environment of its own: it and what it wants may not meet what the tests want.
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
    """What Google calls a parameter of ours, and whether it is the other way round."""
    name = name.replace(".layer.", ".layer_")
    name = name.removesuffix(".weight") if "_embeddings" in name else name
    for ours, theirs in (
        ("cls.predictions.bias", "cls.predictions.output_bias"),
        ("cls.seq_relationship.weight", "cls.seq_relationship.output_weights"),
        ("cls.seq_relationship.bias", "cls.seq_relationship.output_bias"),
        ("classifier.weight", "output_weights"),
        ("classifier.bias", "output_bias"),
        ("LayerNorm.weight", "LayerNorm.gamma"),
        ("LayerNorm.bias", "LayerNorm.beta"),
    ):
        name = name.replace(ours, theirs)
    turned = name.endswith(".weight")
    return (name.removesuffix("weight") + "kernel" if turned else name).replace(".", "/"), turned


def write_checkpoint(model: torch.nn.Module, folder: Path) -> str:
    """A checkpoint with the weights of a model of `transformers`, and what training adds; its name."""
    tensors = {"global_step": np.int64(7)}
    for name, parameter in model.named_parameters():
        if "decoder" not in name:
            own, turned = original_name(name)
            tensors[own] = parameter.detach().T.numpy() if turned else parameter.detach().numpy()
            tensors[f"{own}/adam_m"] = np.zeros(parameter.shape, np.float32)
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


@needs_tensorflow
@pytest.mark.parametrize(
    "name", ["BertForPreTraining", "BertForMaskedLM", "BertForSequenceClassification", "BertModel"]
)
def test_a_checkpoint_of_tensorflow_becomes_a_model(name, tmp_path, capsys):
    torch.manual_seed(0)
    # Long enough that the index has several blocks, and keys that share their beginnings.
    theirs = getattr(transformers, name)(transformers.BertConfig(**SIZES | {"num_hidden_layers": 12})).eval()
    prefixed = torch.nn.ModuleDict({"bert": theirs}) if name == "BertModel" else theirs
    prefixed.config = theirs.config
    prefix = write_checkpoint(prefixed, tmp_path)
    assert main(["import", prefix, str(tmp_path / "out")]) == 0
    assert f"holds a {name} of" in capsys.readouterr().out
    assert (tmp_path / "out" / "vocab.txt").is_file()
    ids = torch.arange(22).view(2, 11)
    ours = getattr(bertfast, name).from_pretrained(tmp_path / "out")
    opened, told = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    for got in (ours(ids), opened(ids)):
        torch.testing.assert_close(got[0], theirs(ids)[0], rtol=1e-4, atol=1e-5)


@needs_tensorflow
def test_what_is_damaged_or_does_not_fit_is_refused(tmp_path, capsys):
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
    assert "lacks: encoder.layer.2." in refused()
    config.write_text(json.dumps(json.loads(kept) | {"num_hidden_layers": 1}))
    assert "holds what no BERT has: encoder.layer.1." in refused()
    config.write_text(json.dumps(json.loads(kept) | {"hidden_size": 96}))
    assert "is of another size" in refused()
    config.write_text(kept)
    data = tmp_path / "bert_model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-100])
    assert "it is damaged" in refused()
    data.unlink()
    assert "which is not beside it" in refused()
    index = tmp_path / "bert_model.ckpt.index"
    index.write_bytes(index.read_bytes()[:-20])
    assert "is damaged, or no index" in refused()
    config.unlink()
    assert "say with --config" in refused()


def test_a_checkpoint_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="without its ending"):
        read_tensors(tmp_path / "bert_model.ckpt")
