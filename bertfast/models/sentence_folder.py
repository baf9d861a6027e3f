"""The files of sentence-transformers around an encoder: `modules.json`, and those that it names."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bertfast.data.text_files import read_json, read_text
from bertfast.data.truncation import read_max_length
from bertfast.models.pooling import POOLINGS
from bertfast.models.sentence_modules import Dense, Normalize, SentenceModules, Step, Truncate
from bertfast.models.weights import config_path, read_weights
from bertfast.runtime.atomic_write import write_atomically

_MODULES, MODEL_OPTIONS, _EMBEDDING = "modules.json", "config_sentence_transformers.json", "sentence_embedding"
_TRANSFORMER = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names that the configuration of a module Transformer has had."""
_FLAGS_OF_POOLING = {  # before there was an entry `pooling_mode`; in the order in which results are concatenated
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Entries of that of a module Transformer that change its results, and the values with which they do not.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "transformer_task": (None, "feature-extraction"),
    "module_output_name": (None, "token_embeddings"),
    "processing_kwargs": (None, {}),
    "config_kwargs": (None, {}),
    "config_args": (None, {}),
    "processor_kwargs": (None, {}),
    "tokenizer_args": (None, {}),
    "tokenizer_name_or_path": (None,),
}


def encoder_folder(folder: Path) -> Path:
    """Return the folder of the encoder of a model's folder: the same, unless its module Transformer has its own."""
    alone = config_path(folder).exists() or not (folder / _MODULES).exists()
    return folder if alone else read_sentence_modules(folder).encoder


def read_sentence_modules(folder: Path) -> SentenceModules:
    """Read what a model's folder says about embeddings: without `modules.json` mean pooling, as sentence-transformers.

    Raises:
        ValueError: The files are damaged, or have modules or options that are not supported.
    """
    path = folder / _MODULES
    if not path.exists():
        return SentenceModules(folder, max_seq_length=read_max_length(folder / "tokenizer_config.json"))
    prompts, default_prompt, model_type, truncate_dim, similarity = _model_options(folder / MODEL_OPTIONS)
    if model_type != "SentenceTransformer":  # a CrossEncoder or another, which has no embeddings of texts
        return SentenceModules(folder, (), max_seq_length=read_max_length(folder / "tokenizer_config.json"))
    entries = _entries(path)
    transformer, *others = [_located(folder, entry) for entry in entries]
    if transformer[0] != "Transformer":
        raise ValueError(f"{path} begins with a module {transformer[0]}, and only Transformer is supported")
    options, files = _transformer_options(transformer[1])
    pooling: tuple[str, ...] = ()
    pools_prompt = True
    after: list[Step] = []
    for kind, location in others:
        config = location / "config.json"
        files += [config] if config.exists() else []
        if kind == "Pooling" and not pooling and not after:
            pooling, pools_prompt = _pooling(config)
        elif kind == "Dense" and pooling:
            after.append(_dense(location))
            files += [*location.glob("*.safetensors"), *location.glob("*.bin")]
        elif kind == "Normalize" and pooling:
            _require_embeddings(config)
            after.append(Normalize())
        elif kind != "Dropout":
            raise ValueError(
                f"{path} has the module {kind}, which is not supported here: only a Transformer and Pooling, "
                "and after these Dense, Normalize and Dropout; embed with sentence-transformers instead"
            )
    if truncate_dim is not None:
        after.append(Truncate(truncate_dim))
    return SentenceModules(
        encoder=transformer[1],
        pooling=pooling,
        pools_prompt=pools_prompt,
        after=tuple(after),
        prompts=prompts,
        default_prompt=default_prompt,
        max_seq_length=options["max_seq_length"] or read_max_length(transformer[1] / "tokenizer_config.json"),
        lowercases=bool(options["do_lower_case"]),
        files=(path, *files, *(file for file in [folder / MODEL_OPTIONS] if file.exists())),
        similarity=similarity,
    )


def _entries(path: Path) -> list[dict[str, str]]:
    try:
        entries = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is cut off or not JSON ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of modules in JSON, [{{…}}, …]")
    for entry in entries:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("type", "path")):
            raise ValueError(f"{path}: each module must have a type and a path, got {json.dumps(entry):.80}")
    return entries


def _located(folder: Path, entry: dict[str, str]) -> tuple[str, Path]:
    """Return the kind of a module, without the package if it is one of sentence-transformers, and its folder."""
    if Path(entry["path"]).is_absolute() or ".." in Path(entry["path"]).parts:
        raise ValueError(f"{folder / _MODULES}: the path {entry['path']!r} is not a folder inside {folder}")
    package, _, name = entry["type"].rpartition(".")
    known = package.partition(".")[0] == "sentence_transformers"
    return name if known else entry["type"], folder / entry["path"]


def _transformer_options(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Return `max_seq_length` and `do_lower_case` of a module Transformer, and the file that they are from."""
    path = next((folder / name for name in _TRANSFORMER if (folder / name).exists()), None)
    options = {} if path is None else read_json(path)
    for name, allowed in _WITHOUT_EFFECT.items():
        value = options.get(name)
        if isinstance(value, dict):
            value = {key: x for key, x in value.items() if key != "trust_remote_code"}
        if value not in allowed:
            raise ValueError(
                f"{path}: {name} {json.dumps(value):.60} is not supported: embed with sentence-transformers instead"
            )
    modalities = options.get("modality_config")
    text = modalities.get("text") if isinstance(modalities, dict) else None
    method = text.get("method_output_name") if isinstance(text, dict) else None
    if modalities is not None and method != "last_hidden_state":
        raise ValueError(f"{path}: only a modality_config of text and its last_hidden_state is supported")
    length, lowercases = options.get("max_seq_length"), options.get("do_lower_case", False)
    if not (length is None or type(length) is int) or not isinstance(lowercases, bool | None):
        raise ValueError(f"{path}: max_seq_length must be a number, and do_lower_case true or false")
    return {"max_seq_length": length, "do_lower_case": lowercases}, [] if path is None else [path]


def _pooling(path: Path) -> tuple[tuple[str, ...], bool]:
    """Return the modes of a module Pooling, and whether the tokens of a prompt are pooled."""
    options = read_json(path)
    modes = options.get("pooling_mode")
    if modes is None:
        modes = [mode for name, mode in _FLAGS_OF_POOLING.items() if options.get(name)] or ["mean"]
        unknown = [name for name, value in options.items() if name.startswith("pooling_mode_") and value]
        unknown = [name for name in unknown if name not in _FLAGS_OF_POOLING]
    else:
        modes = modes if isinstance(modes, list) else [modes]
        unknown = [mode for mode in modes if not isinstance(mode, str) or mode not in POOLINGS]
    if unknown or not modes:
        raise ValueError(f"{path}: the pooling {unknown[0] if unknown else modes!r} is none of {', '.join(POOLINGS)}")
    return tuple(modes), options.get("include_prompt", True) is not False


def _require_embeddings(path: Path) -> dict[str, Any]:
    """Return the configuration of a module, if it has one, that runs on the pooled embeddings."""
    options = read_json(path) if path.exists() else {}
    for name in ("module_input_name", "module_output_name"):
        if options.get(name) not in (None, _EMBEDDING):
            raise ValueError(f"{path}: {name} must be {_EMBEDDING}, got {options[name]!r:.40}")
    return options


def _dense(folder: Path) -> Dense:
    options = _require_embeddings(folder / "config.json")
    weights = read_weights(folder)
    name = str(options.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = _activation(folder / "config.json", name)
    weight, bias, residual_weight = map(weights.get, ("linear.weight", "linear.bias", "residual.weight"))
    if weight is None or weight.dim() != 2:
        raise ValueError(f"{folder} has no linear.weight, which its module Dense needs: copy or download it again")
    fits = bias is None or bias.shape == weight.shape[:1]
    if not (fits and (residual_weight is None or residual_weight.shape == weight.shape)) or not all(
        x.isfinite().all() for x in weights.values()
    ):
        raise ValueError(f"{folder}: the weights of its module Dense do not fit or are not finite: download it again")

    def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        return layer.requires_grad_(False)

    residual: nn.Module | None = None
    if options.get("use_residual"):
        residual = nn.Identity() if residual_weight is None else linear(residual_weight)
    return Dense(linear(weight, bias), activation, residual)


def _activation(path: Path, name: str) -> nn.Module:
    """Return the activation of PyTorch that a module Dense names, such as `torch.nn.modules.activation.Tanh`."""
    kind = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        with suppress(TypeError):  # it has arguments, which an activation of sentence-transformers cannot get
            return kind()
    raise ValueError(f"{path}: the activation_function {name} is no activation of torch.nn without arguments")


def _model_options(path: Path) -> tuple[dict[str, str], str | None, str, int | None, str]:
    """Return the prompts, the name of the default one, the kind of the model, `truncate_dim` and the similarity."""
    options = read_json(path) if path.exists() else {}
    prompts, default = options.get("prompts") or {}, options.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str | None) for prompt in prompts.values()):
        raise ValueError(f"{path}: prompts must be texts by name, got {json.dumps(prompts):.80}")
    if default is not None and not (isinstance(default, str) and default in prompts):
        raise ValueError(f"{path}: default_prompt_name {default!r} is none of its prompts")
    truncate_dim = options.get("truncate_dim")
    if truncate_dim is not None and not (type(truncate_dim) is int and truncate_dim > 0):
        raise ValueError(f"{path}: truncate_dim must be a positive integer, got {json.dumps(truncate_dim):.40}")
    named = {name: prompt or "" for name, prompt in prompts.items()}
    kind, similarity = options.get("model_type", "SentenceTransformer"), options.get("similarity_fn_name") or "cosine"
    return named, default, str(kind), truncate_dim, str(similarity)


CONTENTS = (_MODULES, MODEL_OPTIONS, _TRANSFORMER[0], "1_Pooling", "2_Normalize")
"""What `write_sentence_modules` and `write_cross_encoder_modules` write."""


def write_sentence_modules(folder: Path, modules: SentenceModules, hidden_size: int, max_seq_length: int) -> None:
    """Write the files with which sentence-transformers opens the encoder in a folder as a model of embeddings.

    Args:
        folder: Folder of the encoder and its tokenizer.
        modules: Pooling and what follows it, without projections; prompts and whether texts are lower-cased.
        hidden_size: Size of the encoder's hidden states.
        max_seq_length: Maximum tokens of a text.
    """
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * any(isinstance(step, Normalize) for step in modules.after)
    paths = ["", *(f"{index}_{kind}" for index, kind in enumerate(kinds) if index)]
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    pooling: dict[str, Any] = {"word_embedding_dimension": hidden_size, "include_prompt": modules.pools_prompt}
    flags = {name: mode in modules.pooling for name, mode in _FLAGS_OF_POOLING.items()}
    in_order = modules.pooling == tuple(mode for name, mode in _FLAGS_OF_POOLING.items() if flags[name])
    pooling |= flags if in_order else {"pooling_mode": list(modules.pooling)}  # which versions before 5 cannot read
    options: dict[str, Any] = {"model_type": "SentenceTransformer", "prompts": dict(modules.prompts)}
    options |= {"default_prompt_name": modules.default_prompt, "similarity_fn_name": modules.similarity}
    truncated = [step.size for step in modules.after if isinstance(step, Truncate)]
    options |= {"truncate_dim": truncated[-1]} if truncated else {}
    files: dict[str, Any] = {
        f"{paths[1]}/config.json": pooling,
        **({f"{paths[2]}/config.json": {}} if len(paths) > 2 else {}),
        _TRANSFORMER[0]: {"max_seq_length": max_seq_length, "do_lower_case": modules.lowercases},
        MODEL_OPTIONS: options,
        _MODULES: entries,  # last: without it the folder is that of an encoder
    }
    _write(folder, files)


def write_cross_encoder_modules(folder: Path, activation: str, max_seq_length: int) -> None:
    """Write the files with which sentence-transformers opens the adapter of a reranker: of whole models it needs none.

    Args:
        folder: Folder of the adapter and its tokenizer.
        activation: Name of what makes scores of logits.
        max_seq_length: Maximum tokens of a query and a document.
    """
    transformer = {
        "transformer_task": "sequence-classification",
        "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
        "module_output_name": "scores",
        "max_seq_length": max_seq_length,
        "config_kwargs": {"num_labels": 1},
        "model_kwargs": {"ignore_mismatched_sizes": True},  # the base model may have a head of another task
    }
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    options: dict[str, Any] = {
        "model_type": "CrossEncoder",
        "activation_fn": activation,
        "prompts": {},
        "default_prompt_name": None,
    }
    _write(folder, {_TRANSFORMER[0]: transformer, MODEL_OPTIONS: options, _MODULES: [module]})


def _write(folder: Path, files: dict[str, Any]) -> None:
    """Write the content of files in JSON, in this order."""
    for name, content in files.items():
        write_atomically(folder / name, json.dumps(content, indent=2) + "\n")
