"""Model folders and TensorFlow checkpoints with every kind of damage."""

import json
import shutil
from pathlib import Path

import torch
from bad_inputs import FAULTS, FILE_FAULTS, replace
from safetensors.torch import load_file, save_file
from sentiment import FILLERS
from tensorflow_checkpoint import tensors_of, write_bundle
from torch import Tensor

from bertfast.data.tokenizer import save_tokenizer, train_tokenizer
from bertfast.models import bert
from bertfast.models.bert import BertConfig


def write_models(folder: Path) -> list[str]:
    """Write intact models with each head, and damaged copies of one that has the weights of all; return their names."""
    model, names = folder / "model", ["model"]
    tokenizer = train_tokenizer([" ".join([*FILLERS, "good", "bad", "what", "it", "then", "over"])] * 20, 128)
    save_tokenizer(tokenizer, model)
    weights_of_all: dict[str, Tensor] = {}
    for kind, labels in _KINDS.items():
        config = BertConfig(**_SIZES, vocab_size=tokenizer.get_vocab_size(), id2label=dict(enumerate(labels)))
        torch.manual_seed(0)
        getattr(bert, kind)(config).save_pretrained(folder / kind)
        save_tokenizer(tokenizer, folder / kind)
        weights_of_all = load_file(folder / kind / "model.safetensors") | weights_of_all
        names.append(kind)
    save_file(weights_of_all, model / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "BertForSequenceClassification" / "config.json", model)
    config, weights = json.loads((model / "config.json").read_text()), (model / "model.safetensors").read_bytes()
    vocabulary = (model / "vocab.txt").read_bytes()
    contents: dict[str, dict[str, bytes | None]] = {}
    for file in ("config.json", "model.safetensors", "vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        whole = (model / file).read_bytes()
        for fault, change in FILE_FAULTS.items():
            contents[f"{file}_{fault}"] = {file: change(whole)}
    for index, change in enumerate(_CONFIG_CHANGES):
        contents[f"config_{index}"] = {"config.json": json.dumps(config | change).encode()}
    multi_label = config | {"problem_type": "multi_label_classification"}
    contents["multi_label"] = {"config.json": json.dumps(multi_label).encode()}
    for name, text in {
        "twice": vocabulary + b"good\n",
        "no_special": vocabulary.replace(b"[MASK]", b"[MASQUE]"),
        "large": vocabulary + b"".join(b"w%d\n" % i for i in range(1000)),
        "short": vocabulary[:200],
        "utf_16": FAULTS["utf_16"](vocabulary),
        "crlf": FAULTS["crlf"](vocabulary),
    }.items():
        contents[f"vocab_{name}"] = {"vocab.txt": text, "tokenizer.json": None}
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    contents["absurd_weights"] = {"model.safetensors": len(header).to_bytes(8, "little") + header}
    contents["long_header"] = {"model.safetensors": (2**60).to_bytes(8, "little") + weights[8:]}
    index = json.dumps({"metadata": {}, "weight_map": {"bert.x": "model-1-of-2.safetensors"}}).encode()
    contents["index"] = {"model.safetensors": None, "model.safetensors.index.json": index}
    contents["pickle"] = {"model.safetensors": None, "pytorch_model.bin": b"\x80\x04cos\nsystem\n."}
    for name, changes in contents.items():
        shutil.copytree(model, folder / name)
        for file, content in changes.items():
            replace(folder / name / file, content)
        names.append(name)
    shutil.copytree(model, folder / "foreign_weights")
    save_file({"a.weight": torch.zeros(2)}, folder / "foreign_weights/model.safetensors", {"format": "pt"})
    return [*names, "foreign_weights"]


_KINDS = {  # by class of a model: its labels
    "BertForSequenceClassification": ["bad", "good"],
    "BertForPreTraining": ["bad", "good"],
    "BertForQuestionAnswering": ["start", "end"],
    "BertForTokenClassification": ["O", "B-GOOD", "B-BAD"],
    "BertForMultipleChoice": ["one"],
}
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}
_CONFIG_CHANGES: list[dict[str, object]] = [
    {"model_type": "gpt2"},
    {"model_type": 3},
    {"hidden_size": "32"},
    {"hidden_size": -32},
    {"hidden_size": 33},
    {"hidden_size": 64},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": 2},
    {"num_hidden_layers": None},
    {"num_attention_heads": 0},
    {"num_attention_heads": 3},
    {"vocab_size": 7},
    {"vocab_size": 0},
    {"vocab_size": 1e3},
    {"max_position_embeddings": 4},
    {"max_position_embeddings": 1},
    {"hidden_act": "none"},
    {"hidden_act": 3},
    {"architectures": ["GPT2Model"]},
    {"architectures": "BertModel"},
    {"architectures": []},
    {"id2label": {"0": "good"}},
    {"id2label": ["good", "bad"]},
    {"id2label": {"a": "good"}},
    {"num_labels": -1},
    {"problem_type": "none"},
    {"is_decoder": True},
    {"dtype": "float7"},
    {"layer_norm_eps": "x"},
    {"hidden_dropout_prob": 7},
    {"position_embedding_type": "relative_key"},
    {"auto_map": {"AutoModel": "evil.Model"}},
    {"type_vocab_size": 0},
    {"type_vocab_size": 1},
    {"pad_token_id": 10**6},
]


def write_checkpoints(folder: Path) -> list[str]:
    """Write an intact TensorFlow checkpoint of a model, and damaged copies; return their prefixes."""
    model = bert.BertForPreTraining(BertConfig(**_SIZES, vocab_size=64))
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    write_bundle(checkpoint / "bert.ckpt", tensors_of(model))
    (checkpoint / "bert_config.json").write_text(json.dumps(_SIZES | {"vocab_size": 64}))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(59))]
    (checkpoint / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    names = ["checkpoint"]
    for file in [path.name for path in checkpoint.iterdir()]:
        for fault, change in FILE_FAULTS.items():
            names.append(f"checkpoint_{file}_{fault}")
            shutil.copytree(checkpoint, folder / names[-1])
            replace(folder / names[-1] / file, change((checkpoint / file).read_bytes()))
    return [f"{name}/bert.ckpt" for name in names]
