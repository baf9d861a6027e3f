"""`bertfast features`: what a model's layers hold of texts, written to disk in parts, so that memory stays flat.

S texts, T tokens, F features.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bertfast.data.corpus import COMPRESSIONS, read_lines
from bertfast.encoder import encode
from bertfast.models.bert import BertModel
from bertfast.models.extensions import LAYERS, BertFeaturesForTokenClassification, select_layers
from bertfast.models.files import write_tensors
from bertfast.runtime.cuda_graph import GraphRunner, capture_for, side_stream
from bertfast.runtime.malloc import give_freed_memory_back
from bertfast.runtime.precision import Precision, autocast, choose_device, choose_precision
from bertfast.tasks.features import Features, ModelInputs, batches_by_length, tokenize
from bertfast.tasks.pretrained import open_model, sequence_length
from bertfast.tasks.sequence_classification import Columns
from bertfast.tasks.tables import read_table

Pool = Literal["cls", "mean", "tokens"]
LINES = tuple(f".txt{compression}" for compression in COMPRESSIONS)


@dataclass(kw_only=True)
class ExtractSettings:
    """Which features, of which texts.

    Attributes:
        model_name_or_path: Folder or hub id of a model and its tokenizer.
        output_dir: Folder for part-00000 and so on; finished parts that are there already are kept.
        input_file: A .txt file with a text a line, which is read as a stream; or a .tsv, .csv or .jsonl file; none:
            lines of standard input.
        text_column: Column of the text; none: sentence, sentence1 or text.
        text_pair_column: Column of the second text of a pair; none: sentence2, if it is there.
        pool: What of each text: [CLS]'s features, the mean of its tokens', or those of all tokens.
        layers: embeddings, second-to-last, last, sum-last-four (their mean), concat-last-four or sum-all.
        form: Of the parts.
        texts_per_part: Texts of a part.
        max_seq_length: Tokens of a text at most, longer ones are cut; none: the positions of the model.
        eval_tokens: About how many tokens to compute at a time.
        cuda_graph: On a GPU, fill batches up to few shapes and replay those that come often from CUDA graphs.
        precision: auto takes bf16 where the device multiplies it natively (and, on a CPU, faster), else fp32.
        device: cpu, cuda, cuda:1, …; none: a GPU if there is one.
    """

    model_name_or_path: str
    output_dir: str
    input_file: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    pool: Pool = "mean"
    layers: str = "last"
    form: Literal["safetensors", "parquet"] = "safetensors"
    texts_per_part: int = 10_000
    max_seq_length: int | None = None
    eval_tokens: int = 8192
    cuda_graph: bool = True
    precision: Precision = "auto"
    device: str | None = None

    def __post_init__(self):
        if self.layers not in LAYERS:
            raise ValueError(f"there are no features {self.layers!r}; there are {', '.join(LAYERS)}")
        if self.form == "parquet" and self.pool == "tokens":
            raise ValueError("a table has one row a text: write the features of tokens as safetensors")
        for name in ("texts_per_part", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")


def extract(settings: ExtractSettings) -> Path:
    """Write the features of all texts; returns the folder.

    A part holds "features", fp32 [S, F], or with the pool "tokens" [T, F] beside "starts" int64 [S + 1], or a column of
    lists.
    """
    model, tokenizer = open_model(BertModel, settings.model_name_or_path, "")
    model = model.to(choose_device(settings.device))
    length = sequence_length(settings.max_seq_length, model.config)
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    texts = _texts(settings)
    with tqdm(desc="features", unit="text") as bar:
        for number in range(sys.maxsize):
            some = list(islice(texts, settings.texts_per_part))
            if not some:
                break
            path = folder / f"part-{number:05}.{settings.form}"
            if not path.exists():
                _write(path, compute(model, tokenize(tokenizer, some, length), settings))
                give_freed_memory_back()  # or a million texts would take what no part takes
            bar.update(len(some))
    return folder


@torch.no_grad()
def compute(model: BertModel, features: Features, settings: ExtractSettings) -> dict[str, Tensor]:
    """The features of tokenized texts, as `extract` writes them."""
    numbers, side_by_side = select_layers(settings.layers, model.config)
    width = model.config.hidden_size * (len(numbers) if side_by_side else 1)
    tokens = settings.pool == "tokens"
    found = torch.empty(len(features.token_ids) if tokens else len(features), width)
    precision = choose_precision(model.device, settings.precision)
    only_last = numbers == [model.config.num_hidden_layers]

    def forward(inputs: ModelInputs) -> Tensor:
        with autocast(model.device, precision):
            recorded: list[Tensor] = []
            last = encode(model, inputs.packed(model), hidden_states=None if only_last else recorded)
        states = [state.float() for state in ([last] if only_last else [recorded[number] for number in numbers])]
        return torch.cat(states, 1) if side_by_side else torch.stack(states).mean(0)

    capture = capture_for(model, precision, enabled=settings.cuda_graph)
    runner = GraphRunner(forward, model.device, capture)
    with side_stream(model.device):
        for rows in batches_by_length(features, settings.eval_tokens):
            lengths = features.lengths[rows]
            inputs = features.model_inputs(rows, labels=False, bucketed=capture is not None)
            hidden = runner(inputs)[: lengths.sum()].cpu()
            if tokens:
                _put(found.numpy(), features, rows, hidden.numpy())
            elif settings.pool == "cls":
                found[rows] = hidden[np.cumsum(lengths) - lengths]
            else:
                found[rows] = torch.segment_reduce(hidden, "mean", lengths=torch.from_numpy(lengths))
    return {"features": found} | ({"starts": torch.from_numpy(features.starts)} if tokens else {})


@torch.no_grad()
def states_on_disk(
    folder: Path, model: BertFeaturesForTokenClassification, features: Features, precision: str, tokens: int
) -> np.ndarray:
    """The hidden states that `model` learns from, fp32 [T, layers, H], mapped from a file in `folder`.

    They are computed, about `tokens` at a time, unless the file is there: its name tells encoder, layers and text.
    """
    known = hashlib.sha256(repr([model.layer_indices, precision]).encode())
    arrays = (features.token_ids, features.token_type_ids, features.starts)
    for array in (*(weight.numpy(force=True) for weight in model.bert.state_dict().values()), *arrays):
        known.update(np.ascontiguousarray(array).view(np.uint8))
    path = folder / f"{known.hexdigest()[:32]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        shape = (len(features.token_ids), len(model.layer_indices), model.config.hidden_size)
        found = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
        for rows in batches_by_length(features, tokens):
            inputs = features.model_inputs(rows, labels=False).to(model.device)
            with autocast(model.device, precision):
                states = model.features(inputs.packed(model)).float().cpu().numpy()
            _put(found, features, rows, states)
        found.flush()
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


def _put(found: np.ndarray, features: Features, rows: np.ndarray, values: np.ndarray) -> None:
    """Put what the batch of `rows` gives for its tokens into the places of all tokens [T, …]."""
    for row, part in zip(rows, features.parts(rows, values), strict=True):
        found[features.starts[row] : features.starts[row + 1]] = part


def _texts(settings: ExtractSettings) -> Iterator[str | tuple[str, str]]:
    path = settings.input_file
    if path is None:
        return (line.rstrip("\r\n") for line in sys.stdin)
    if path.endswith(LINES):
        return (line.rstrip("\r\n") for _, line in read_lines(Path(path)))
    table = read_table(path)
    columns = Columns.choose(table, settings.text_column, settings.text_pair_column, None)
    texts = table.texts(columns.text)
    return iter(texts if columns.text_pair is None else zip(texts, table.texts(columns.text_pair), strict=True))


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f".{path.name}")
    if path.suffix == ".safetensors":
        write_tensors(tensors, temporary)
    else:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise ImportError("a .parquet file wants `pip install bertfast[parquet]`") from None
        features = tensors["features"].numpy()
        lists = pyarrow.FixedSizeListArray.from_arrays(features.ravel(), features.shape[1])
        parquet.write_table(pyarrow.table({"features": lists}), temporary)
    temporary.rename(path)
