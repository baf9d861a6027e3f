"""Count the instructions of the CPU kernels per token, which do not depend on what else the machine does.

    python -m bench.instructions [KERNEL …] [--results FOLDER]

A program without PyTorch (`bench/instructions.cpp`) calls one kernel on one thread, in fp32 with dropout 0.1 and the
widths of BERT-base, and valgrind counts what the kernel executes. The instruction set is AVX2, because valgrind has no
AVX-512; int8 weights are multiplied without instructions for dot products, which not all CPUs have. The objects are
those of the native library, if they are newer than its sources; otherwise they are compiled. Counts of different
compilers are not comparable.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.arguments import add_names, result_parser
from bench.result_files import RESULTS, ROOT, require_clean_tree, write_result

INSTRUCTION_SET = "avx2"
OBJECTS = ROOT / "build" / "objects"  # of setup.py
TOKENS = {"add_layer_norm": 64, "bias_gelu": 64, "gelu_layer_norm": 64, "embeddings": 64, "cross_entropy": 8}
TOKENS |= {"attention": 128, "attention_window": 1024, "rotary": 64}  # a window of 64, in one sequence
TOKENS |= {"packed_fp32": 64, "packed_bf16": 64, "packed_int8": 64, "packed_layer": 128}  # for inference
DIRECTIONS = ("forward", "backward")
FORWARD_ONLY = ("packed_fp32", "packed_bf16", "packed_int8", "packed_layer")
# Two of them compute the gradient in the same function if it is requested.
UNDIRECTED = ("cross_entropy", "rotary", *FORWARD_ONLY)
# Names of functions that are not those of kernels.
FUNCTIONS = dict.fromkeys(FORWARD_ONLY[:3], "packed_linear") | {"attention_window": "attention"}
TOOLS = ("g++", "valgrind")


def main() -> None:
    parser = result_parser(__doc__, RESULTS)
    add_names(parser, "kernels", "kernel", TOKENS, default=list(TOKENS))
    arguments = parser.parse_args()
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        parser.error(f"{' and '.join(missing)} must be installed")
    require_clean_tree(arguments.results)
    with TemporaryDirectory() as folder:
        counts = per_token(build(Path(folder)), arguments.kernels)
    for name, count in counts.items():
        print(f"{name:<28}{count:>10.0f} instructions per token")
    result = {"compiler": compiler(), "instruction_set": INSTRUCTION_SET, "per_token": counts}
    print(f"\nwritten to {write_result('instructions', result, arguments.results)}")


def compiler() -> str:
    """Return the name and version of the C++ compiler."""
    return "g++ " + subprocess.check_output(["g++", "-dumpfullversion"], text=True).strip()


def per_token(program: Path, kernels: Iterable[str]) -> dict[str, float]:
    """Return the instructions per token of each kernel and direction."""
    return {
        f"{kernel}, {direction}": count(program, kernel, direction, TOKENS[kernel]) / TOKENS[kernel]
        for kernel in kernels
        for direction in DIRECTIONS[: 1 if kernel in FORWARD_ONLY else 2]
    }


def build(folder: Path) -> Path:
    """Compile and link the program in a folder; return its path."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    flags, silent, instruction_set = (
        re.search(pattern, setup, re.MULTILINE)[1].split()  # type: ignore[index]  # setup.py has all of them
        for pattern in (r'^FLAGS = "(.*)"', r'^SILENT = "(.*?)"', rf'"{INSTRUCTION_SET}": "(.*?)"')
    )
    # The kernels' own flags; -fPIC and hidden symbols are those of the library.
    command = ["g++", *flags, *silent, *instruction_set, f"-DBERTFAST_SET={INSTRUCTION_SET}"]
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cpu").glob("*.h"), ROOT / "setup.py"]
    objects, running = [], []
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if source.stem == "instruction_set":
            continue
        built = OBJECTS / f"{source.stem}.{INSTRUCTION_SET}.o"
        newest = max(path.stat().st_mtime for path in (source, *headers))
        if not built.is_file() or built.stat().st_mtime < newest:
            built = folder / f"{source.stem}.o"
            running.append(subprocess.Popen([*command, "-c", str(source), "-o", str(built)]))
        objects.append(str(built))
    statuses = [process.wait() for process in running]  # of all, before the folder is removed
    if any(statuses):
        raise SystemExit("the kernels cannot be compiled")
    program = folder / "instructions"
    main_file = str(ROOT / "bench" / "instructions.cpp")
    subprocess.run([*command, main_file, *objects, "-o", str(program)], check=True)
    return program


def count(program: Path, kernel: str, direction: str, tokens: int) -> int:
    """Return the instructions of one call of a kernel for a number of tokens."""
    function = FUNCTIONS.get(kernel, kernel) + ("" if kernel in UNDIRECTED else f"_{direction}")
    counted = f"--toggle-collect=bertfast::{INSTRUCTION_SET}::{function}(*"
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", counted]
    command = [*valgrind, str(program), kernel, direction, str(tokens)]
    ran = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", ran.stderr)
    if ran.returncode or found is None or int(found[1]) == 0:
        raise SystemExit(f"valgrind counted no instructions of {function}: {ran.stderr.strip()[-500:]}")
    return int(found[1])


if __name__ == "__main__":
    main()
