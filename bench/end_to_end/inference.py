"""A batch of 32 real texts through a model of base size, beside transformers, ONNX Runtime and OpenVINO.

    python -m bench.end_to_end.inference [CASE …] [--repeats N] [--data FOLDER] [--results FOLDER]

Sentences of SST-2 are classified, paragraphs of SQuAD become hidden states; FOLDER of --data has
glue/SST-2/dev.tsv.gz, squad/dev-v1.1.json.gz and vocab/bert-base-uncased-vocab.txt. All get the same padded ids, made
beforehand, and have the same random weights and as many threads; their outputs must agree before anything is timed.
The others belong into a folder of their own, that is on the path (`make bench` does so):

    pip install --no-deps --target .venv/runtimes \\
        onnxruntime openvino onnx onnxscript onnx_ir ml_dtypes protobuf flatbuffers
    PYTHONPATH=.venv/runtimes python -m bench.end_to_end.inference
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from torch import Tensor

import bertfast
from bench.harness import DATA, DEVICE, RESULTS, matrix_rate, median_ratio, seconds_of, side_by_side, write_result
from bertfast.data.tokenizer import load_tokenizer
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.precision import has_bf16_gemm
from bertfast.tasks.tables import read_table

BATCH = 32
LONGEST = 384  # tokens of a text, as fine-tuning on SQuAD has it
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of outputs, beside the largest or 1
OTHERS = ("transformers", "onnxruntime", "openvino")
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A model's class and size, the texts, and the precision."""

    model: str
    texts: str
    dtype: torch.dtype = torch.float32
    preset: str = "base"


CASES = {
    f"{texts}-{precision}": Case(model, texts, dtype)
    for texts, model in (("sst2", "BertForSequenceClassification"), ("squad", "BertModel"))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
}
TRIAL = {"trial": Case("BertModel", "random", preset="tiny")}  # to try the program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(CASES | TRIAL)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=f"of {known}")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES | TRIAL):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {known}")
    keep_freed_memory()
    print("| case | who | s | sentences/s | tokens/s | times ours | of the matrix rate |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.cases:
        case = (CASES | TRIAL)[name]
        if case.dtype == torch.bfloat16 and not has_bf16_gemm(DEVICE):
            print(f"{name}: left out: this processor multiplies no bf16", file=sys.stderr)
        elif case.texts != "random" and not arguments.data.is_dir():
            print(f"{name}: left out: there are no texts in {arguments.data}", file=sys.stderr)
        else:
            result = measure(name, case, arguments.repeats, arguments.data)
            write_result(f"inference-{name}", result, arguments.results)
            for who, row in result["contenders"].items():
                print(
                    f"| {name} | {who} | {row['median_s']:.4f} | {row['sentences_per_second']:.1f} | "
                    f"{row['tokens_per_second']:.0f} | {row['times_ours']:.2f} | {row['share_of_matrix_rate']:.0%} |",
                    flush=True,
                )
            for who, reason in result["not_run"].items():
                print(f"{name}: {who} did not run: {reason}", file=sys.stderr, flush=True)
    print(f"\nwritten to {arguments.results}")


def measure(name: str, case: Case, repeats: int, data: Path) -> dict:
    """Time a case; raises if outputs do not agree."""
    torch.manual_seed(0)
    config = bertfast.preset_config(case.preset)
    inputs = padded(token_ids(case.texts, data, config))
    attended = inputs["attention_mask"].bool()
    ours = getattr(bertfast, case.model)(config).eval()
    values = config.to_dict()
    model = getattr(transformers, case.model)(transformers.BertConfig(**values, attn_implementation="sdpa")).eval()
    model.load_state_dict(ours.state_dict())

    def result(output: Tensor) -> Tensor:
        output = torch.as_tensor(output).float()
        return output[attended] if case.model == "BertModel" else output

    not_run, runs, outputs = {}, {}, {}
    with TemporaryDirectory() as folder, torch.inference_mode():
        for who, build in zip(("ours", *OTHERS), (eager, eager, onnxruntime, openvino), strict=True):
            try:
                run = build(ours if who == "ours" else model, inputs, case.dtype, Path(folder))
                outputs[who], runs[who] = result(run()), run
            except Exception as error:
                if who == "ours":
                    raise
                not_run[who] = f"{type(error).__name__}: {error}".splitlines()[0]
        largest = max(outputs["ours"].abs().max().item(), 1)
        errors = {who: (output - outputs["ours"]).abs().max().item() / largest for who, output in outputs.items()}
        if not max(errors.values()) <= TOLERANCE[case.dtype]:
            raise SystemExit(f"{name}: the outputs differ, nothing is timed: {errors}")
        seconds = side_by_side(runs, repeats)
    lengths = attended.sum(1).tolist()
    work = model_flops(config, lengths)
    hidden, wide, tokens = config.hidden_size, config.intermediate_size, sum(lengths)
    shapes = [(tokens, hidden, 3 * hidden), (tokens, hidden, hidden), (tokens, hidden, wide), (tokens, wide, hidden)]
    rate = matrix_rate(shapes * config.num_hidden_layers, case.dtype)
    contenders = {}
    for who, samples in seconds.items():
        median = statistics.median(seconds_of(samples))
        contenders[who] = {
            "median_s": median,
            "sentences_per_second": BATCH / median,
            "tokens_per_second": tokens / median,
            "times_ours": median_ratio(samples, seconds["ours"]),
            "share_of_matrix_rate": work / median / rate,
            "error": errors[who],
            "seconds": [sample.seconds for sample in samples],
            "cores": [sample.cores for sample in samples],
        }
    return {
        "case": name,
        "lengths": lengths,
        "padded_tokens": attended.numel(),
        "model_gflop": work / 1e9,
        "matrix_rate_gflops": rate / 1e9,
        "contenders": contenders,
        "not_run": not_run,
    }


def token_ids(texts: str, data: Path, config: bertfast.BertConfig) -> list[list[int]]:
    """The ids of BATCH texts, evenly spread over the file, each cut at LONGEST."""
    if texts == "random":
        return [torch.randint(1000, config.vocab_size, (length,)).tolist() for length in range(4, 4 + BATCH)]
    if texts == "sst2":
        some = read_table(data / "glue" / "SST-2" / "dev.tsv.gz").texts("sentence")
    else:
        with gzip.open(data / "squad" / "dev-v1.1.json.gz", "rt", encoding="utf-8") as file:
            articles = json.load(file)["data"]
        some = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]
    tokenizer = load_tokenizer(data / "vocab" / "bert-base-uncased-vocab.txt")
    tokenizer.enable_truncation(LONGEST)
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(some[:: len(some) // BATCH][:BATCH])]


def padded(sequences: list[list[int]]) -> dict[str, Tensor]:
    """The ids padded to the longest, as all of the models take them."""
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def eager(model: torch.nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype, _folder: Path) -> Run:
    model = model.to(dtype)
    return lambda: model(**inputs)[0]


def onnxruntime(model: torch.nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> Run:
    import onnxruntime

    if dtype != torch.float32:
        raise NotImplementedError("its CPU kernels take no bf16")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads would slow the next contender
    path = str(exported(model, inputs, folder))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {name: x.numpy() for name, x in inputs.items()}
    return lambda: session.run(None, feeds)[0]


def openvino(model: torch.nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> Run:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.compile_model(str(exported(model.float(), inputs, folder)), "CPU", settings)
    feeds = {name: x.numpy() for name, x in inputs.items()}
    return lambda: compiled(feeds)[0]


def exported(model: torch.nn.Module, inputs: dict[str, Tensor], folder: Path) -> Path:
    """The model as an ONNX file for inputs of this shape."""
    path = folder / "model.onnx"
    if not path.exists():

        class First(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, input_ids, attention_mask, token_type_ids):
                return self.model(input_ids, attention_mask, token_type_ids, return_dict=False)[0]

        names = list(inputs)
        torch.onnx.export(First().eval(), tuple(inputs.values()), path, input_names=names, output_names=["output"])
    return path


def model_flops(config: bertfast.BertConfig, lengths: list[int]) -> int:
    """2 · encoder parameters · tokens + 4 · layers · H · Σ s²; padding is no work."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    parameters = layers * hidden * (4 * hidden + 2 * config.intermediate_size)
    return 2 * parameters * sum(lengths) + 4 * layers * hidden * sum(length**2 for length in lengths)


if __name__ == "__main__":
    main()
