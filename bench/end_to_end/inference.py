"""Time inference of a base model on 32 real texts against transformers, ONNX Runtime and OpenVINO.

    python -m bench.end_to_end.inference [CASE …] [--repeats N] [--data FOLDER] [--results FOLDER]

Sentences of SST-2 are classified; paragraphs of SQuAD become hidden states. FOLDER of --data contains
glue/SST-2/dev.tsv.gz, squad/dev-v1.1.json.gz and vocab/bert-base-uncased-vocab.txt. All runtimes get the same padded
token ids, random weights and number of threads; their outputs must agree before anything is timed. Install the other
runtimes into a separate folder and put it on the path (`make bench-inference` does so):

    pip install --no-deps --target .venv/runtimes \\
        onnxruntime openvino onnx onnxscript onnx_ir ml_dtypes protobuf flatbuffers
    PYTHONPATH=.venv/runtimes:. python -m bench.end_to_end.inference
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor

import bertfast
from bench.ceilings import gemm_throughput, layer_gemms
from bench.harness import (
    DATA,
    DEVICE,
    Sample,
    hf_config,
    median_ratio,
    require_clean_tree,
    result_parser,
    seconds_of,
    side_by_side,
    write_result,
)
from bertfast.architectures.presets import Preset
from bertfast.data.tokenizer import load_tokenizer
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.precision import has_bf16_gemm
from bertfast.tasks.tables import read_table

BATCH = 32
MAX_LENGTH = 384  # tokens of a text, as usual for fine-tuning on SQuAD
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of outputs, relative to the largest absolute value, at least 1
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """The class and size of the model, the texts and the precision."""

    model: str
    texts: str
    dtype: torch.dtype = torch.float32
    preset: Preset = "base"


CASES = {
    f"{texts}-{precision}": Case(model, texts, dtype)
    for texts, model in (("sst2", "BertForSequenceClassification"), ("squad", "BertModel"))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
}
TRIAL = {"trial": Case("BertModel", "random", preset="tiny")}  # to try the program


def main() -> None:
    parser = result_parser(__doc__)
    known = CASES | TRIAL
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=f"of {', '.join(known)}")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of which the median is taken")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(known):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    require_clean_tree(arguments.results)
    keep_freed_memory()
    print("| case | implementation | s | sentences/s | tokens/s | relative time | GEMM efficiency |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.cases:
        case = known[name]
        if case.dtype == torch.bfloat16 and not has_bf16_gemm(DEVICE):
            print(f"{name}: skipped, this processor has no bf16 instructions", file=sys.stderr)
        elif case.texts != "random" and not arguments.data.is_dir():
            print(f"{name}: skipped, there is no folder {arguments.data} (--data)", file=sys.stderr)
        else:
            result = measure(name, case, arguments.repeats, arguments.data)
            write_result(f"inference-{name}", result, arguments.results)
            print_result(result)
    print(f"\nwritten to {arguments.results}")


def print_result(result: dict[str, Any]) -> None:
    """Print a table row per implementation, and the reasons of those that did not run."""
    for name, row in result["implementations"].items():
        print(
            f"| {result['case']} | {name} | {row['median_s']:.4f} | {row['sentences_per_second']:.1f} | "
            f"{row['tokens_per_second']:.0f} | {row['relative_time']:.2f} | {row['gemm_efficiency']:.0%} |",
            flush=True,
        )
    for name, reason in result["not_run"].items():
        print(f"{result['case']}: {name} did not run: {reason}", file=sys.stderr, flush=True)


def measure(name: str, case: Case, repeats: int, data: Path) -> dict[str, object]:
    """Time a case and return its result.

    Raises:
        SystemExit: The outputs differ.
    """
    torch.manual_seed(0)
    config = bertfast.preset_config(case.preset)
    inputs = padded(token_ids(case.texts, data, config))
    attended = inputs["attention_mask"].bool()
    with TemporaryDirectory() as folder, torch.inference_mode():
        runs, errors, not_run = build(case, config, inputs, Path(folder))
        if not max(errors.values()) <= TOLERANCE[case.dtype]:
            raise SystemExit(f"{name}: the outputs differ, so nothing is timed: {errors}")
        timed = side_by_side(runs, repeats)
    lengths = attended.sum(1).tolist()
    flops = model_flops(config, lengths)
    tokens = sum(lengths)
    throughput = gemm_throughput(layer_gemms(config, tokens) * config.num_hidden_layers, case.dtype)
    return {
        "case": name,
        "lengths": lengths,
        "padded_tokens": attended.numel(),
        "model_gflop": flops / 1e9,
        "gemm_gflops": throughput / 1e9,
        "implementations": {
            implementation: entry(samples, timed["bertfast"], tokens, flops / throughput, errors[implementation])
            for implementation, samples in timed.items()
        },
        "not_run": not_run,
    }


def entry(
    samples: list[Sample], bertfast_samples: list[Sample], tokens: int, lower_bound: float, error: float
) -> dict[str, object]:
    """Return the entry of an implementation in the result."""
    median = statistics.median(seconds_of(samples))
    return {
        "median_s": median,
        "sentences_per_second": BATCH / median,
        "tokens_per_second": tokens / median,
        "relative_time": median_ratio(samples, bertfast_samples),
        "gemm_efficiency": lower_bound / median,
        "error": error,
        "seconds": [sample.seconds for sample in samples],
        "cores": [sample.cores for sample in samples],
    }


def build(
    case: Case, config: bertfast.BertConfig, inputs: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Run], dict[str, float], dict[str, str]]:
    """Return the functions to time, their errors relative to bertfast's outputs, and why the others cannot run."""
    attended = inputs["attention_mask"].bool()
    model = getattr(bertfast, case.model)(config).eval()
    hf_model = getattr(transformers, case.model)(hf_config(config)).eval()
    hf_model.load_state_dict(model.state_dict())

    def without_padding(output: Tensor) -> Tensor:
        output = torch.as_tensor(output).float()
        return output[attended] if case.model == "BertModel" else output

    not_run, runs, outputs = {}, {}, {}
    for name, factory in FACTORIES.items():
        try:
            run = factory(model if name == "bertfast" else hf_model, inputs, case.dtype, folder)
            outputs[name], runs[name] = without_padding(run()), run
        except Exception as error:
            if name == "bertfast":
                raise
            not_run[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    largest = max(outputs["bertfast"].abs().max().item(), 1)
    errors = {name: (output - outputs["bertfast"]).abs().max().item() / largest for name, output in outputs.items()}
    return runs, errors, not_run


def token_ids(texts: str, data: Path, config: bertfast.BertConfig) -> list[list[int]]:
    """Return the ids of BATCH texts, evenly spread over the file, each truncated to MAX_LENGTH tokens."""
    if texts == "random":
        return [torch.randint(1000, config.vocab_size, (length,)).tolist() for length in range(4, 4 + BATCH)]
    if texts == "sst2":
        lines = read_table(data / "glue" / "SST-2" / "dev.tsv.gz").texts("sentence")
    else:
        with gzip.open(data / "squad" / "dev-v1.1.json.gz", "rt", encoding="utf-8") as file:
            articles = json.load(file)["data"]
        lines = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]
    tokenizer = load_tokenizer(data / "vocab" / "bert-base-uncased-vocab.txt")
    tokenizer.enable_truncation(MAX_LENGTH)
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(lines[:: len(lines) // BATCH][:BATCH])]


def padded(sequences: list[list[int]]) -> dict[str, Tensor]:
    """Return the inputs of the models, padded to the longest sequence."""
    length = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (length - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (length - len(sequence)) for sequence in sequences])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def eager(model: torch.nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype, _folder: Path) -> Run:
    model = model.to(dtype)
    return lambda: model(**inputs)[0]


def onnxruntime(model: torch.nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> Run:
    import onnxruntime

    if dtype != torch.float32:
        raise NotImplementedError("its CPU kernels do not support bf16")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads go on spinning and slow down the implementation that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    path = str(exported(model, inputs, folder))
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
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


FACTORIES = {"bertfast": eager, "transformers": eager, "onnxruntime": onnxruntime, "openvino": openvino}


def exported(model: torch.nn.Module, inputs: dict[str, Tensor], folder: Path) -> Path:
    """Return the model as an ONNX file for inputs of this shape."""
    path = folder / "model.onnx"
    if not path.exists():

        class FirstOutput(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
                output: Tensor = self.model(input_ids, attention_mask, token_type_ids, return_dict=False)[0]
                return output

        names = list(inputs)
        torch.onnx.export(
            FirstOutput().eval(), tuple(inputs.values()), path, input_names=names, output_names=["output"]
        )
    return path


def model_flops(config: bertfast.BertConfig, lengths: list[int]) -> int:
    """Return 2 · encoder parameters · tokens + 4 · layers · H · Σ s²; padding is not counted."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    parameters = layers * hidden * (4 * hidden + 2 * config.intermediate_size)
    return 2 * parameters * sum(lengths) + 4 * layers * hidden * sum(length**2 for length in lengths)


if __name__ == "__main__":
    main()
