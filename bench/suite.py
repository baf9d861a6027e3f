"""Run the benchmarks of this machine, each in a process of its own, and skip those that are up to date.

    python -m bench.suite [PART …] [--all] [--plan] [--results FOLDER] [--data FOLDER] [--model FOLDER]

Results go to the folder of this processor, see `bench.result_files.machine_folder`. A part is up to date if each of its
result files was measured on this processor, from a commit without changes whose measured sources are those of now. So
an interrupted run continues where it stopped. The estimates are those of two cores; the parts that run by default
take about 40 minutes, the others run with their names or `--all`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.arguments import DATA, PUBLISHED, add_names, quoted, result_parser
from bench.end_to_end.runtimes import HOW_TO_INSTALL, missing_runtimes
from bench.harness import DEVICE
from bench.result_files import ROOT, origin_of, require_clean_tree
from bertfast.architectures import FAMILIES
from bertfast.runtime.machine import changed_files, processor
from bertfast.runtime.precision import has_bf16_gemm

# What a result depends on; `bench` is left out below where it only draws or writes pages.
SOURCES = ("bertfast", "kernels", "csrc", "setup.py", "build_support", "bench")
NOT_MEASURED = ("bench/results", "bench/LOG.md", "bench/suite.py", "bench/page", "bench/figures.py", "bench/report.py")
VOCABULARY = Path("vocab", "bert-base-uncased-vocab.txt")


@dataclass(frozen=True)
class Part:
    """A program of `bench`.

    Attributes:
        minutes: Estimated duration on two cores.
        arguments: Module below `bench` and its arguments; {data}, {model} and {results} are folders.
        files: Names of the result files, without suffix.
        bf16: Whether it requires bf16 instructions.
        by_name: Whether it runs only if it is named, or with `--all`.
        packages: Packages that it requires, besides those of the other parts.
    """

    minutes: float
    arguments: tuple[str, ...]
    files: tuple[str, ...]
    bf16: bool = False
    by_name: bool = False
    packages: tuple[str, ...] = ()

    def folders(self) -> set[str]:
        """Return which of "data" and "model" it requires."""
        return {name for name in ("data", "model") if any(f"{{{name}}}" in text for text in self.arguments)}


def step(case: str, minutes: float, bf16: bool = False, by_name: bool = False) -> Part:
    """Return the part that measures a pre-training step."""
    arguments = ("end_to_end.pretraining_step", case, "--repeats", "5", "--compile-seconds", "240")
    return Part(minutes, arguments, (f"pretraining_step-{case}",), bf16, by_name)


TUNED = ("sst-2", "squad")
OPERATORS = (
    *("attention", "rotary", "add_layer_norm", "pre_norm"),
    *("linear_gelu", "gated_activation", "linear_cross_entropy"),
)
OTHER_FAMILIES = tuple(name for name in FAMILIES if name not in ("bert", "modernbert"))
PARTS = {
    "ceilings": Part(0.5, ("ceilings",), ("ceilings",)),
    "step, base": step("base-128-fp32", 3),
    "step, base, bf16": step("base-128-bf16", 3, bf16=True),
    "step, small": step("small-128-fp32", 1),
    "step, base, 2,048 tokens, bf16": step("base-128-full-16-bf16", 2, bf16=True, by_name=True),
    "step, base, 8,192 tokens, bf16": step("base-128-full-64-bf16", 4, bf16=True, by_name=True),
    "parts of a step": Part(1, ("end_to_end.step_parts",), ("step_parts",)),
    "inference": Part(10, ("end_to_end.inference", "base", "--data", "{data}"), ("inference-base",)),
    "inference, MiniLM": Part(
        6, ("end_to_end.inference", "minilm", "--data", "{data}"), ("inference-minilm",), by_name=True
    ),
    "inference, one thread": Part(
        6,
        ("end_to_end.inference", "base", "minilm", "--threads", "1", "--single", "--data", "{data}"),
        ("inference-base-1-threads", "inference-minilm-1-threads"),
        by_name=True,
    ),
    "fp32 GEMMs": Part(1, ("gemm_libraries",), ("gemm_libraries",)),
    "fine-tuning step": Part(
        2,
        ("end_to_end.finetuning", "{model}", "{data}", "--speed", "5", "--output", "build/bench", "--tasks", *TUNED),
        tuple(f"finetuning-speed-{task}" for task in TUNED),
    ),
    "patched model": Part(2.5, ("end_to_end.patched", "{model}", "{data}", "--rounds", "5"), ("patched",)),
    "ModernBERT": Part(
        8, ("end_to_end.families", "modernbert", "--data", "{data}"), ("families-modernbert",), by_name=True
    ),
    "other families": Part(
        18,
        ("end_to_end.families", *OTHER_FAMILIES, "--data", "{data}"),
        tuple(f"families-{name}" for name in OTHER_FAMILIES),
        by_name=True,
    ),
    "embeddings": Part(2.5, ("end_to_end.embed", "{model}", "{data}", "--rounds", "5", "--memory"), ("embed",)),
    "embeddings, 100,000 sentences": Part(
        16,
        (
            "end_to_end.embed",
            "{model}",
            "{data}",
            "--rounds",
            "5",
            "--sentences",
            "20000",
            "--memory",
            "10000",
            "100000",
        ),
        ("embed-20000",),
        by_name=True,
    ),
    "training of embeddings": Part(
        3,
        ("end_to_end.sentence_training", "{model}", "{data}"),
        ("sentence_training",),
        by_name=True,
        packages=("sentence_transformers", "accelerate", "datasets"),
    ),
    "accuracy in int8": Part(
        8,
        ("end_to_end.int8_accuracy", "{model}", "{data}", "--output", "build/bench"),
        ("int8_accuracy",),
        by_name=True,
    ),
    "serving": Part(5, ("end_to_end.serving", "{model}", "{data}"), ("serving",), by_name=True),
    "data": Part(
        1,
        ("end_to_end.data", "{data}/corpus/wikipedia-valid.txt.xz", "--tokenizer", f"{{data}}/{VOCABULARY}"),
        ("data",),
    ),
    "memory": Part(3.5, ("end_to_end.growth", "--max-length", "2048", "--max-sequences", "16"), ("growth",)),
    "memory of the loss": Part(4, ("end_to_end.vocabulary", "--max-vocab", "65536"), ("vocabulary",), by_name=True),
    "long sequences": Part(6, ("end_to_end.long_sequences",), ("long_sequences",), by_name=True),
    "operators": Part(
        5,
        ("cpu_operators", *OPERATORS, "--seconds", "0.3"),
        ("cpu_operators",),
    ),
    "step, ModernBERT": step("modernbert-base-1024-fp32", 8, by_name=True),
    "step, ModernBERT, bf16": step("modernbert-base-1024-bf16", 4, bf16=True, by_name=True),
    "step, ModernBERT, uniform": step("modernbert-base-1024-uniform-fp32", 7, by_name=True),
    "step, ModernBERT, uniform, bf16": step("modernbert-base-1024-uniform-bf16", 4, bf16=True, by_name=True),
}
DEFAULT = [name for name, part in PARTS.items() if not part.by_name]


def main() -> None:
    parser = result_parser(__doc__)
    add_names(parser, "parts", "part", PARTS, " (default: `make bench`'s)")
    parser.add_argument("--all", action="store_true", help="run all parts, also those that otherwise run by name only")
    parser.add_argument("--plan", action="store_true", help="only print what would be measured")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the data")
    default = next(PUBLISHED.glob("*/model"), PUBLISHED)
    parser.add_argument("--model", type=Path, default=default, help="folder of a published model, such as MiniLM")
    arguments = parser.parse_args()
    parts = arguments.parts or (list(PARTS) if arguments.all else DEFAULT)
    require_clean_tree(arguments.results)
    folders = {"data": arguments.data, "model": arguments.model, "results": arguments.results}
    reasons = {name: reason_to_skip(PARTS[name], folders) for name in parts}
    print_plan(reasons)
    if missing := missing_runtimes():
        lacking = ", ".join(missing)
        print(f"warning: results would lack {lacking}, not installed here: {HOW_TO_INSTALL}", file=sys.stderr)
    if not arguments.plan and (failed := run([name for name in reasons if reasons[name] is None], folders)):
        raise SystemExit(f"failed: {quoted(failed)}")


def reason_to_skip(part: Part, folders: dict[str, Path]) -> str | None:
    """Return why a part is not run, None if it is."""
    if part.bf16 and not has_bf16_gemm(DEVICE):
        return "this processor has no bf16 instructions"
    if missing := [name for name in part.packages if importlib.util.find_spec(name) is None]:
        return f"{', '.join(missing)} not installed"
    for name in sorted(part.folders()):
        if not (folders[name] / ("config.json" if name == "model" else ".")).exists():
            return f"there is no {folders[name]} (--{name})"
    if all(up_to_date(folders["results"] / f"{name}.json") for name in part.files):
        return "up to date"
    return None


def print_plan(reasons: dict[str, str | None]) -> None:
    """Print what will be measured, with the estimates, and what is skipped."""
    for name, reason in reasons.items():
        print(f"{name:<31} {f'{PARTS[name].minutes:4.1f} min' if reason is None else reason}")
    print(f"{'all':<31} {minutes_of(name for name in reasons if reasons[name] is None):4.1f} min", flush=True)


def minutes_of(names: Any) -> float:
    """Return the estimated minutes of parts."""
    return sum(PARTS[name].minutes for name in names)


def run(names: Sequence[str], folders: dict[str, Path]) -> list[str]:
    """Run parts one after another, print the time that is left, and return the names of those that failed."""
    failed, planned, started = [], 0.0, time.monotonic()
    for index, name in enumerate(names):
        print(f"\n== {name}", flush=True)
        module, *rest = (text.format_map(folders) for text in PARTS[name].arguments)
        command = [sys.executable, "-m", f"bench.{module}", *rest, "--results", str(folders["results"])]
        if subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path_of_children()}).returncode:
            failed.append(name)
        planned += PARTS[name].minutes
        # The estimates of the other parts, corrected by how long the parts up to now took.
        elapsed = (time.monotonic() - started) / 60
        left = minutes_of(names[index + 1 :]) * elapsed / planned
        print(f"== {name} ended after {elapsed:.1f} min; about {left:.0f} min left", flush=True)
    return failed


def path_of_children() -> str:
    """Return PYTHONPATH with the checkout, which contains `bench`."""
    return os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))


def up_to_date(file: Path) -> bool:
    """Return whether a result was measured on this processor from the sources of the checkout, without changes."""
    origin = origin_of(file)
    commit = str(origin.get("commit", ""))
    if origin.get("processor") != processor() or not re.fullmatch("[0-9a-f]{7,40}", commit):
        return False
    excluded = [f":(exclude){path}" for path in NOT_MEASURED]
    command = ["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", *SOURCES, *excluded]
    return not changed_files(ROOT) and subprocess.run(command, capture_output=True).returncode == 0


if __name__ == "__main__":
    main()
