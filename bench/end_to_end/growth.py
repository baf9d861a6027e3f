"""How time and memory grow with the length and the number of sequences, beside transformers: tables and a plot.

    python -m bench.end_to_end.growth [--longest 8192] [--most 64] [--preset base] [--results FOLDER]

One layer of the preset's width, forward and backward in training with dropout 0.1 and full sequences: from 128 to
`--longest` tokens, one sequence alone and as many as have `--longest` tokens together, and from 1 to `--most`
sequences of 128. Each point runs in a process of its own; its memory is the process's peak less what it held before
the first step, and a process may have 16 GiB. FOLDER gets growth.json and growth.png.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import transformers

import bertfast
from bench.harness import DEVICE, ON_GPU, RESULTS, seconds_of, side_by_side, stopwatch, write_result

SHORTEST = 128
WHO = ("ours", "transformers")
LIMIT = 16 << 30  # bytes of a process
LONG = 5  # seconds of a step above which it is timed once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--most", type=int, default=64)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--point", nargs=3, metavar=("WHO", "SEQUENCES", "LENGTH"), help="measure this alone")
    arguments = parser.parse_args()
    if arguments.point:
        who, sequences, length = arguments.point
        print(json.dumps(point(who, int(sequences), int(length), arguments.preset)))
        return
    if ON_GPU:
        parser.error("this measures a CPU")
    sweeps, measured = points(arguments.longest, arguments.most), {}
    print("| sequences | length | who | s | MB |")
    print("|---|---|---|---|---|")
    for sequences, length in dict.fromkeys(place for places in sweeps.values() for place in places):
        for who in WHO:
            result = in_a_process(who, sequences, length, arguments.preset)
            measured[sequences, length, who] = result
            said = result.get("reason") or f"{result['seconds']:.4f} | {result['peak_bytes'] / 1e6:.0f}"
            print(f"| {sequences} | {length} | {who} | {said} |", flush=True)
    results = {
        sweep: [
            {"sequences": sequences, "length": length, "who": who, **measured[sequences, length, who]}
            for sequences, length in places
            for who in WHO
        ]
        for sweep, places in sweeps.items()
    }
    path = write_result("growth", {"preset": arguments.preset, "sweeps": results}, arguments.results)
    plot(results, path.with_suffix(".png"))
    print(f"\nwritten to {arguments.results}")


def points(longest: int, most: int) -> dict[str, list[tuple[int, int]]]:
    """(sequences, length) of each sweep."""
    lengths = [SHORTEST << i for i in range((longest // SHORTEST).bit_length())]
    numbers = [1 << i for i in range(most.bit_length())]
    return {
        "one sequence": [(1, length) for length in lengths],
        f"{longest} tokens in all": [(longest // length, length) for length in lengths],
        f"sequences of {SHORTEST}": [(number, SHORTEST) for number in numbers],
    }


def in_a_process(who: str, sequences: int, length: int, preset: str) -> dict:
    """A point measured in a process of its own, or the reason why not."""
    options = ["--preset", preset, "--point", who, str(sequences), str(length)]
    ran = subprocess.run([sys.executable, "-m", "bench.end_to_end.growth", *options], capture_output=True, text=True)
    if ran.returncode:
        lines = [line for line in ran.stderr.splitlines() if line.strip()]
        return {"reason": lines[-1] if lines else f"it ended with {ran.returncode}"}
    return json.loads(ran.stdout.splitlines()[-1])


def point(who: str, sequences: int, length: int, preset: str) -> dict:
    """Seconds of a step and the peak memory beyond what there was before the first."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    torch.manual_seed(0)
    options = {"num_hidden_layers": 1, "vocab_size": 1024, "max_position_embeddings": length}
    options |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = bertfast.preset_config(preset, **options)
    if who == "ours":
        model = bertfast.BertModel(config)
    else:
        values = config.to_dict()
        model = transformers.BertModel(transformers.BertConfig(**values, attn_implementation="sdpa"))
    model.train()
    ids = torch.randint(config.vocab_size, (sequences, length), device=DEVICE)
    mask = torch.ones_like(ids)

    def step() -> None:
        model(ids, attention_mask=mask).last_hidden_state.square().mean().backward()
        model.zero_grad(set_to_none=True)

    before = peak_memory()
    repeats = 1 if stopwatch(step) > LONG else 3
    seconds = statistics.median(seconds_of(side_by_side({"step": step}, repeats)["step"]))
    return {"seconds": seconds, "peak_bytes": peak_memory() - before}


def peak_memory() -> int:
    """Bytes that this program has held at most; a process's `ru_maxrss` would begin with what its parent held."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def plot(sweeps: dict[str, list[dict]], path: Path) -> None:
    """Time above, memory below, a column for each sweep."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not here (it comes with the extra `plots`)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(sweeps), figsize=(4 * len(sweeps), 6), sharex="col", layout="constrained")
    for column, (sweep, results) in zip(axes.T, sweeps.items(), strict=True):
        x = "sequences" if sweep.startswith("sequences") else "length"
        for axis, name, unit in zip(column, ("seconds", "peak_bytes"), (1, 1e6), strict=True):
            for who in WHO:
                mine = [result for result in results if result["who"] == who and name in result]
                axis.plot([result[x] for result in mine], [result[name] / unit for result in mine], "o-", label=who)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
        column[0].set_title(sweep)
        column[1].set_xlabel(x if x == "sequences" else "tokens a sequence")
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("peak memory, MB")
    axes[0, 0].legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
