"""Measure how time and memory of one layer grow with the number and length of sequences, compared with transformers.

    python -m bench.end_to_end.growth [--max-length 8192] [--max-sequences 64] [--preset base] [--results FOLDER]

One layer of the width of the preset, forward and backward pass in training with dropout 0.1 and without padding: from
128 to `--max-length` tokens, as one sequence and as a batch of `--max-length` tokens in total, and from 1 to
`--max-sequences` sequences of 128 tokens. Each point runs in its own process, limited to 16 GiB; its memory is the peak
of the process minus what the process held before the first step. The lower bound of the time is that of `bench.bounds`;
that of the memory is the gradients, which all exist after a step, and the last hidden states with their gradient.
FOLDER gets growth.json and growth.png.
"""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import torch
import transformers

import bertfast
from bench.arguments import result_parser
from bench.bounds import Rates
from bench.figures import hardware, plain_ticks, save
from bench.harness import DEVICE, ON_GPU, hf_config
from bench.points import in_a_process, peak_memory, restart_peak, timed
from bench.result_files import require_clean_tree, write_result
from bertfast.architectures.presets import Preset
from bertfast.runtime.plotting import COLORS, load_pyplot

MIN_LENGTH = 128
IMPLEMENTATIONS = ("bertfast", "transformers")
MEMORY_LIMIT = 16 << 30  # bytes per process


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--max-length", type=int, default=8192, help="largest length of a sequence in tokens")
    parser.add_argument("--max-sequences", type=int, default=64, help="largest number of sequences")
    parser.add_argument("--preset", default="base", help="size of the model")
    parser.add_argument(
        "--point", nargs=3, metavar=("NAME", "SEQUENCES", "LENGTH"), help="measure only this point and print it"
    )
    arguments = parser.parse_args()
    if arguments.point:
        name, sequences, length = arguments.point
        print(json.dumps(point(name, int(sequences), int(length), arguments.preset)))
        return
    if ON_GPU:
        parser.error("this program measures a CPU")
    require_clean_tree(arguments.results)
    results = measure(arguments.max_length, arguments.max_sequences, arguments.preset)
    path = write_result("growth", {"preset": arguments.preset, "sweeps": results}, arguments.results)
    plot(path)
    print(f"\nwritten to {arguments.results}")


def measure(max_length: int, max_sequences: int, preset: Preset) -> dict[str, list[dict[str, Any]]]:
    """Measure and print all points; return the results by sweep."""
    sweeps = points(max_length, max_sequences)
    measured: dict[tuple[int, int, str], dict[str, Any]] = {}
    print("| sequences | length | implementation | s | MB |")
    print("|---|---|---|---|---|")
    for sequences, length in dict.fromkeys(shape for shapes in sweeps.values() for shape in shapes):
        for name in IMPLEMENTATIONS:
            options = ["--preset", preset, "--point", name, str(sequences), str(length)]
            result = in_a_process("end_to_end.growth", options)
            measured[sequences, length, name] = result
            cells = result.get("reason") or f"{result['seconds']:.4f} | {result['peak_bytes'] / 1e6:.0f}"
            print(f"| {sequences} | {length} | {name} | {cells} |", flush=True)
    return {
        sweep: [
            {"sequences": sequences, "length": length, "implementation": name, **measured[sequences, length, name]}
            for sequences, length in shapes
            for name in IMPLEMENTATIONS
        ]
        for sweep, shapes in sweeps.items()
    }


def points(max_length: int, max_sequences: int) -> dict[str, list[tuple[int, int]]]:
    """Return the (sequences, length) of each sweep."""
    lengths = [MIN_LENGTH << i for i in range((max_length // MIN_LENGTH).bit_length())]
    numbers = [1 << i for i in range(max_sequences.bit_length())]
    return {
        "one sequence": [(1, length) for length in lengths],
        f"{max_length} tokens in total": [(max_length // length, length) for length in lengths],
        f"sequences of {MIN_LENGTH} tokens": [(number, MIN_LENGTH) for number in numbers],
    }


def point(name: str, sequences: int, length: int, preset: Preset) -> dict[str, Any]:
    """Return the seconds of a step, the peak memory beyond that before the first step in bytes, and lower bounds."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "vocab_size": 1024, "max_position_embeddings": length}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = bertfast.preset_config(preset, architecture="bert", **sizes, **dropout)
    model: transformers.BertModel
    model = bertfast.BertModel(config) if name == "bertfast" else transformers.BertModel(hf_config(config))
    model.train()
    ids = torch.randint(config.vocab_size, (sequences, length), device=DEVICE)
    mask = torch.ones_like(ids)

    def loss() -> torch.Tensor:
        mean: torch.Tensor = model(ids, attention_mask=mask).last_hidden_state.square().mean()
        return mean

    def step() -> None:
        loss().backward()
        model.zero_grad(set_to_none=True)

    before = restart_peak()
    found = timed(step)
    found["peak_bytes"] = peak_memory() - before
    loss().backward()
    gradients = sum(x.grad.nbytes for x in model.parameters() if x.grad is not None)
    hidden = sequences * length * config.hidden_size * 4
    lengths = [length] * sequences
    rates = Rates.measured(config, sequences * length, torch.float32, training=True)
    found |= {"bound_bytes": gradients + 2 * hidden, "bound_s": rates.training(config, lengths)}
    return found | rates.entries()


def plot(path: Path) -> None:
    """Draw a result file, with a column per sweep, time above and memory below; the PNG file is next to it."""
    pyplot = load_pyplot()
    if pyplot is None:
        print("no plot: matplotlib is not installed (pip install 'bertfast[plots]')")
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    sweeps = result["sweeps"]
    figure, axes = pyplot.subplots(2, len(sweeps), figsize=(4 * len(sweeps), 6), sharex="col", layout="constrained")
    figure.suptitle(f"One layer of BERT-{result['preset']}, training, fp32; {hardware(result['origin'])}")
    for column, (sweep, results) in zip(axes.T, sweeps.items(), strict=True):
        x = "sequences" if sweep.startswith("sequences") else "length"
        for axis, key, unit in zip(column, ("seconds", "peak_bytes"), (1, 1e6), strict=True):
            for name in IMPLEMENTATIONS:
                own = [result for result in results if result["implementation"] == name and key in result]
                y = [result[key] / unit for result in own]
                axis.plot([result[x] for result in own], y, "o-", label=name, color=COLORS[name])
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            plain_ticks(axis.yaxis)
            sizes = sorted({result[x] for result in results})
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
            axis.grid(alpha=0.3)
        column[0].set_title(re.sub(r"\d+", lambda number: f"{int(number[0]):,}", sweep))
        column[1].set_xlabel("sequences" if x == "sequences" else "tokens per sequence")
    axes[0, 0].set_ylabel("time of a step (s)")
    axes[1, 0].set_ylabel("peak memory (MB)")
    axes[0, 0].legend()
    save(figure, path.with_suffix(".png"), [result])


if __name__ == "__main__":
    main()
