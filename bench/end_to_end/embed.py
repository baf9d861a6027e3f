"""`bertfast embed` vs sentence-transformers on the same sentences: seconds, in turn, and memory by their number.

    python -m bench.end_to_end.embed MODEL DATA [--rounds N] [--memory N …] [--results FOLDER]

MODEL is a folder that SentenceTransformer opens and that takes the mean of all tokens; DATA holds
glue/SST-2/train.tsv.gz. Both read a file with a sentence a line and write their vectors to disk, in fp32. For the
memory each side runs in a process of its own on so many sentences, those of SST-2 over and over, and its peak is what
the process held at most.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from bench.end_to_end.growth import peak_memory
from bench.harness import RESULTS, write_result
from bertfast.inference.embed import EmbedSettings, embed
from bertfast.tasks.tables import read_table

TIMED = 4096  # sentences of a round
BATCH, LENGTH, TOLERANCE = 32, 128, 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--memory", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], metavar="N")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--point", nargs=2, metavar=("WHO", "FILE"), help="run this alone and print bytes and seconds")
    arguments = parser.parse_args()
    if arguments.point:
        who, file = arguments.point
        started = time.perf_counter()
        with TemporaryDirectory() as folder:
            SIDES[who](arguments.model, Path(file), Path(folder))
        print(peak_memory(), time.perf_counter() - started)
        return
    sentences = read_table(arguments.data / "glue" / "SST-2" / "train.tsv.gz").columns["sentence"]
    with TemporaryDirectory() as folder:
        result = {"threads": torch.get_num_threads(), "speed": speed(arguments, sentences, Path(folder))}
        print(f"{result['speed']['median_ratio']:.2f} x sentence-transformers", flush=True)
        result["memory"] = memory(arguments, sentences, Path(folder))
    write_result("embed", result, arguments.results)


def ours(model: Path, file: Path, folder: Path) -> torch.Tensor:
    """Into parts of safetensors; returns the first."""
    where = {"model_name_or_path": str(model), "input_file": str(file), "output_dir": str(folder)}
    settings = EmbedSettings.of(**where, pooling="mean", max_seq_length=LENGTH, precision="fp32", device="cpu")
    return load_file(embed(settings) / "part-00000.safetensors")["embeddings"]


def theirs(model: Path, file: Path, folder: Path) -> torch.Tensor:
    """Into one .npy file; returns what it holds."""
    encoder = SentenceTransformer(str(model), device="cpu")
    encoder.max_seq_length = LENGTH
    lines = file.read_text(encoding="utf-8").splitlines()
    vectors = encoder.encode(lines, batch_size=BATCH, show_progress_bar=False)
    np.save(folder / "vectors.npy", vectors)
    return torch.from_numpy(vectors)


SIDES = {"bertfast": ours, "sentence-transformers": theirs}


def speed(arguments: argparse.Namespace, sentences: list[str], folder: Path) -> dict:
    """Seconds of both, in turn, on other sentences each round, after an uncounted one in which they are compared."""
    samples = {who: [] for who in SIDES}
    for number in range(arguments.rounds + 1):
        file = written(folder / "round.txt", sentences[number * TIMED :], TIMED)
        found = []
        for who, run in SIDES.items():
            with TemporaryDirectory() as out:
                started = time.perf_counter()
                found.append(torch.nn.functional.normalize(run(arguments.model, file, Path(out))))
                samples[who].append(time.perf_counter() - started)
        worst = (found[0] - found[1]).abs().max().item()
        if not worst < TOLERANCE:
            raise SystemExit(f"the vectors differ by {worst}, nothing is timed")
    samples = {who: seconds[1:] for who, seconds in samples.items()}
    ratio = statistics.median(b / a for a, b in zip(samples["bertfast"], samples["sentence-transformers"], strict=True))
    return {"sentences": TIMED, **samples, "median_ratio": ratio}


def memory(arguments: argparse.Namespace, sentences: list[str], folder: Path) -> list[dict]:
    """Peak bytes and seconds of each number of sentences; of the greatest ours alone."""
    points = []
    for number, who in itertools.product(arguments.memory, SIDES):
        if who == "sentence-transformers" and number == max(arguments.memory):
            continue  # it would take an hour to say what the numbers before it say
        file = written(folder / "many.txt", sentences, number)
        model, data = str(arguments.model), str(arguments.data)
        command = [sys.executable, "-m", "bench.end_to_end.embed", model, data, "--point", who, str(file)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peak, seconds = ran.stdout.split()[-2:]
        points.append({"who": who, "sentences": number, "peak_bytes": int(peak), "seconds": float(seconds)})
        print(f"{who}, {number} sentences: {int(peak) / 1e6:.0f} MB, {float(seconds):.0f} s", flush=True)
    return points


def written(path: Path, sentences: list[str], number: int) -> Path:
    """A file of so many of them, over and over."""
    path.write_text("".join(f"{line}\n" for line in itertools.islice(itertools.cycle(sentences), number)), "utf-8")
    return path


if __name__ == "__main__":
    main()
