"""Time `bertfast embed` against sentence-transformers and its backends, and measure the peak memory.

    python -m bench.end_to_end.embed MODEL DATA [--rounds N] [--sentences N] [--memory N …] [--results FOLDER]

MODEL is a folder that SentenceTransformer opens and whose pooling is the mean of all tokens; DATA contains
glue/SST-2/train.tsv.gz. All read a file with one sentence per line and write the embeddings to disk; they are timed
alternately. Embeddings in fp32 must agree within TOLERANCE; those in bf16 and int8 must have a mean cosine of at least
MIN_COSINE with bertfast's in fp32, and the result has their mean and first percentile. The backends "onnx" and
"openvino" of sentence-transformers get models that were exported before.
For the memory, bertfast and sentence-transformers run in their own processes on N sentences, those of SST-2 repeated,
and the result is the peak of the process. The lower bound of the time is that of `bench.bounds`, for batches of BATCH
sentences, without reading text and writing vectors; that of the memory is the weights, since vectors go to disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from bench.arguments import at_least_one, model_parser
from bench.bounds import Rates
from bench.end_to_end.runtimes import precision_of
from bench.harness import DEVICE, reason_of
from bench.points import in_a_process, peak_memory
from bench.result_files import require_clean_tree, write_result
from bertfast.data.tokenizer import load_tokenizer
from bertfast.inference.embed import EmbedSettings, embed
from bertfast.models.files import read_config
from bertfast.runtime.precision import has_bf16_gemm
from bertfast.tasks.tables import read_table

SENTENCES = 4096  # per round
BATCH, LENGTH = 32, 128
TOLERANCE, MIN_COSINE = 1e-5, 0.999


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--rounds", type=at_least_one, default=6, help="rounds of which the median is taken")
    parser.add_argument(
        "--sentences",
        type=at_least_one,
        default=SENTENCES,
        metavar="N",
        help="sentences per round; the name of the result file ends in it if it is not the default",
    )
    sizes = [10_000, 100_000, 1_000_000]
    parser.add_argument("--memory", type=int, nargs="*", default=sizes, metavar="N", help="numbers of sentences")
    parser.add_argument(
        "--point", nargs=2, metavar=("NAME", "FILE"), help="run only one implementation and print bytes"
    )
    arguments = parser.parse_args()
    if arguments.point:
        name, file = arguments.point
        with TemporaryDirectory() as folder:
            WITH_MEMORY[name](arguments.model, Path(file), Path(folder))
        print(json.dumps({"peak_bytes": peak_memory()}))
        return
    require_clean_tree(arguments.results)
    sentences = read_table(arguments.data / "glue" / "SST-2" / "train.tsv.gz").columns["sentence"]
    with TemporaryDirectory() as folder:
        timed = speed(arguments, sentences, Path(folder))
        print(f"{timed['median_ratio']:.2f} x sentence-transformers", flush=True)
        peaks = memory(arguments, sentences, Path(folder))
    name = "embed" if arguments.sentences == SENTENCES else f"embed-{arguments.sentences}"
    write_result(name, {"threads": torch.get_num_threads(), "speed": timed, "memory": peaks}, arguments.results)


def embed_with_bertfast(
    model: Path, file: Path, folder: Path, precision: Literal["fp32", "bf16", "int8"] = "fp32"
) -> torch.Tensor:
    """Write the embeddings to safetensors files in `folder`; return them."""
    where = {"model_name_or_path": str(model), "input_file": str(file), "output_dir": str(folder)}
    settings = EmbedSettings.of(**where, pooling="mean", max_seq_length=LENGTH, precision=precision, device="cpu")
    parts = sorted(embed(settings).glob("part-*.safetensors"))
    return torch.cat([load_file(part)["embeddings"] for part in parts])


def embed_with_sentence_transformers(
    model: Path,
    file: Path,
    folder: Path,
    backend: Literal["torch", "onnx", "openvino"] = "torch",
    options: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Write the embeddings to one .npy file in `folder`; return them. The options are those of the model."""
    encoder = SentenceTransformer(str(model), device="cpu", backend=backend, model_kwargs=options)
    encoder.max_seq_length = LENGTH
    lines = file.read_text(encoding="utf-8").splitlines()
    vectors = encoder.encode(lines, batch_size=BATCH, show_progress_bar=False)
    np.save(folder / "vectors.npy", vectors)
    return torch.from_numpy(vectors)


Embed = Callable[[Path, Path, Path], torch.Tensor]
WITH_MEMORY: dict[str, Embed] = {
    "bertfast": embed_with_bertfast,
    "sentence-transformers": embed_with_sentence_transformers,
}
BACKENDS: tuple[Literal["onnx", "openvino"], ...] = ("onnx", "openvino")


def implementations(model: Path, folder: Path) -> tuple[dict[str, tuple[Path, Embed]], dict[str, str]]:
    """Return each implementation with its model, exported into `folder` if it needs that, and why others cannot run.

    The name of one that does not compute in fp32 ends in its precision.
    """
    runs = WITH_MEMORY | {"bertfast, int8": partial(embed_with_bertfast, precision="int8")}
    if has_bf16_gemm(DEVICE):
        runs["bertfast, bf16"] = partial(embed_with_bertfast, precision="bf16")
        in_bf16 = partial(embed_with_sentence_transformers, options={"dtype": torch.bfloat16})
        runs["sentence-transformers, bf16"] = in_bf16
    found: dict[str, tuple[Path, Embed]] = {name: (model, run) for name, run in runs.items()}
    not_run = {}
    for backend in BACKENDS:
        name, exported = f"sentence-transformers, {backend}", folder / backend
        try:
            SentenceTransformer(str(model), device="cpu", backend=backend).save_pretrained(str(exported))
        except Exception as error:
            not_run[name] = reason_of(error)
            print(f"{name} did not run: {not_run[name]}", file=sys.stderr, flush=True)
        else:
            found[name] = exported, partial(embed_with_sentence_transformers, backend=backend)
    return found, not_run


def speed(arguments: argparse.Namespace, sentences: list[str], folder: Path) -> dict[str, Any]:
    """Time all alternately, on other sentences in each round, after an untimed round that compares the embeddings.

    The lower bound of a precision is the median of those of the rounds, whose sentences differ.
    """
    runs, not_run = implementations(arguments.model, folder)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    cosines: dict[str, list[torch.Tensor]] = {name: [] for name in runs if precision_of(name) != "fp32"}
    for number in range(arguments.rounds + 1):
        file = write_lines(folder / "round.txt", of_round(sentences, number, arguments.sentences))
        expected: torch.Tensor | None = None
        for name, (model, run) in runs.items():
            with TemporaryDirectory() as out:
                started = time.perf_counter()
                found = torch.nn.functional.normalize(run(model, file, Path(out)).float())
                samples[name].append(time.perf_counter() - started)
            expected = found if expected is None else expected
            if name in cosines:
                cosines[name].append((found * expected).sum(1))
            require_agreement(name, found, expected)
    samples = {name: seconds[1:] for name, seconds in samples.items()}
    pairs = zip(samples["bertfast"], samples["sentence-transformers"], strict=True)
    ratio = statistics.median(other / bertfast for bertfast, other in pairs)
    entries = {"sentences": arguments.sentences, **samples, "not_run": not_run, "median_ratio": ratio}
    return entries | {
        "cosines": {name: summary(torch.cat(of_rounds)) for name, of_rounds in cosines.items()},
        "bounds": {
            precision: lower_bound(arguments, sentences, dtype)
            for precision, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items()
            if precision in {*map(precision_of, runs)}
        },
    }


def require_agreement(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse embeddings that are too far from those of bertfast in fp32.

    Args:
        name: Name of the implementation.
        found: Its embeddings, [sentences, hidden], of length 1.
        expected: Those of bertfast in fp32.

    Raises:
        SystemExit: They differ by too much for the precision of the implementation.
    """
    if precision_of(name) == "fp32":
        if not (worst := (found - expected).abs().max().item()) < TOLERANCE:
            raise SystemExit(f"{name}: the embeddings differ by {worst}, so nothing is timed")
    elif not (mean := (found * expected).sum(1).mean().item()) >= MIN_COSINE:
        raise SystemExit(f"{name}: the mean cosine with fp32 is {mean}, so nothing is timed")


def summary(cosines: torch.Tensor) -> dict[str, float]:
    """Return the mean and the first percentile of cosines."""
    return {"mean": cosines.mean().item(), "first_percentile": cosines.quantile(0.01).item()}


def lower_bound(arguments: argparse.Namespace, sentences: list[str], dtype: torch.dtype) -> dict[str, float]:
    """Return the median of the lower bounds of the timed rounds in a precision, and the measured rates."""
    tokenizer, config = load_tokenizer(arguments.model), read_config(arguments.model)
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    rounds = []
    for number in range(1, arguments.rounds + 1):
        texts = list(of_round(sentences, number, arguments.sentences))
        lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
        rounds.append([lengths[start : start + BATCH] for start in range(0, len(lengths), BATCH)])
    tokens = sum(map(sum, rounds[0])) // len(rounds[0])
    rates = Rates.measured(config, tokens, dtype)
    bound = statistics.median(rates.inference(config, batches) for batches in rounds)
    return {"lower_bound_s": bound, **rates.entries()}


def memory(arguments: argparse.Namespace, sentences: list[str], folder: Path) -> list[dict[str, object]]:
    """Return peak bytes for each number of sentences, from a million on only those of bertfast; and the weights'."""
    points = []
    weights = 4 * sum(x.numel() for x in SentenceTransformer(str(arguments.model), device="cpu").parameters())
    for number, name in itertools.product(arguments.memory, WITH_MEMORY):
        if name != "bertfast" and number >= 1_000_000:
            continue  # it would take an hour
        file = write_lines(folder / "many.txt", of_round(sentences, 0, number))
        options = [str(arguments.model), str(arguments.data), "--point", name, str(file)]
        found = in_a_process("end_to_end.embed", options)
        if "reason" in found:
            raise SystemExit(f"{name}, {number} sentences: {found['reason']}")
        points.append({"implementation": name, "sentences": number, **found, "bound_bytes": weights})
        print(f"{name}, {number} sentences: {found['peak_bytes'] / 1e6:.0f} MB", flush=True)
    return points


def of_round(sentences: list[str], number: int, count: int) -> Iterator[str]:
    """Return the `count` sentences of a round, which start where those of the round before end, and wrap around."""
    return itertools.islice(itertools.cycle(sentences), number * count, (number + 1) * count)


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    """Write lines to a file; return the file."""
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


if __name__ == "__main__":
    main()
