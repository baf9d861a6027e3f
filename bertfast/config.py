"""BertConfig: the sizes of a model, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")

# Layers, hidden width: the sizes of Turc et al. (2019) and of Devlin et al. (2019); heads are 64 wide.
_PRESETS = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}
Preset = Literal["tiny", "mini", "small", "medium", "base", "large"]

_NOT_WRITTEN = ("extra", "num_labels", "return_logits")


@dataclass
class BertConfig:
    """The configuration of a BERT, with Hugging Face's names and defaults.

    Attributes:
        num_labels, id2label: how many labels a task head tells apart, and their names; either gives the other.
        extra: what else a `config.json` held; written back, so that it survives a round trip.
        return_logits: return the masked-LM logits in training mode too, where the loss does without them; not saved.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    is_decoder: bool = False
    problem_type: str | None = None
    num_labels: int | None = None
    id2label: dict[int, str] | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    return_logits: bool = False
    extra: dict = field(default_factory=dict, repr=False)

    model_type: ClassVar[str] = "bert"

    def __post_init__(self):
        named = self.id2label is not None and self.num_labels in (None, len(self.id2label))
        if not named:
            self.id2label = {i: f"LABEL_{i}" for i in range(2 if self.num_labels is None else self.num_labels)}
        self.id2label = {int(i): label for i, label in self.id2label.items()}
        self.num_labels = len(self.id2label)
        self._check()

    def _check(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            p = getattr(self, name)
            if p is not None and not 0 <= p < 1:
                raise ValueError(f"{name} must be in [0, 1), got {p}")

    @property
    def label2id(self) -> dict[str, int]:
        """The number of each label's name."""
        return {label: i for i, label in self.id2label.items()}

    @property
    def head_dimension(self) -> int:
        """D: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def preset(cls, name: str, **changes) -> BertConfig:
        """One of the published sizes: tiny, mini, small, medium, base, large."""
        if name not in _PRESETS:
            raise ValueError(f"there is no preset {name!r}; presets are {', '.join(_PRESETS)}")
        layers, hidden = _PRESETS[name]
        sizes = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": hidden // 64,
            "intermediate_size": 4 * hidden,
        }
        return cls(**(sizes | changes))

    @classmethod
    def from_dict(cls, values: dict, **changes) -> BertConfig:
        """From what a `config.json` holds, with `changes` to it."""
        model_type = values.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"this is the configuration of a {model_type!r} model, not of a BERT")
        derived = ("model_type", "label2id", "extra")
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in {**values, **changes}.items() if name not in derived}
        extra = {name: values.pop(name) for name in [*values] if name not in known}
        return cls(**values, extra=extra)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes) -> BertConfig:
        """Read `folder/config.json`, with `changes` to it."""
        path = Path(folder, "config.json")
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no config.json, so it is not a model's folder")
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")), **changes)

    def to_dict(self) -> dict:
        """What `config.json` holds."""
        values = {name: value for name, value in asdict(self).items() if name not in _NOT_WRITTEN}
        return {**self.extra, **values, "model_type": self.model_type, "label2id": self.label2id}

    def save_pretrained(self, folder: str | Path, architecture: str | None = None) -> None:
        """Write `folder/config.json`, naming the class that the weights beside it belong to."""
        values = self.to_dict() | ({"architectures": [architecture]} if architecture else {})
        Path(folder, "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
