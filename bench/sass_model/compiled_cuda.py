"""Tabulate the machine code that nvcc generated for the CUDA C++ kernels, and fail if it has faults.

    python -m bench.sass_model.compiled_cuda [--required] [--output bench/results/compiled_cuda.md]

For each kernel of the native library the table has registers per thread, and the number of Hopper's instructions:
wgmma (HGMMA) and loads by TMA (UTMALDG), which attention must contain on sm_90a. Spilled registers, serialised wgmma,
barriers that limit the blocks of an SM, instructions that touch registers of a pending wgmma, and a source that failed
to build are faults here; all but the hazards cost an installation only speed or one operation.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from bench.result_files import RESULTS, origin, require_clean_tree
from bench.sass_model import occupancy, sass
from bertfast.ops import cuda_build, native

HOPPER = ("HGMMA", "UTMALDG")  # attention contains both
Key = tuple[str, str]  # GPU architecture, symbol of a kernel
Resources = dict[Key, tuple[int, int]]  # registers per thread, and the bytes that it spills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "compiled_cuda.md", help="Markdown file for the table")
    parser.add_argument("--required", action="store_true", help="fail if the library has no CUDA C++ kernels")
    arguments = parser.parse_args()
    require_clean_tree(arguments.output)
    build = cuda_build.BUILD
    if native.UNAVAILABLE_REASON is not None or build is None or build.nvcc is None:
        print(without_kernels(arguments.required), file=sys.stderr)
        return int(arguments.required)
    if build.reason is not None:
        print(cuda_build.summary(), file=sys.stderr)
        return 1
    targets = {target.removesuffix("+PTX") for targets in build.architectures.values() for target in targets}
    architectures = [f"sm_{target}" for target in sorted(targets, key=lambda name: (int(name.rstrip("af")), name))]
    used, code = resources(cuobjdump("--dump-resource-usage")), listings(cuobjdump("--dump-sass"))
    counted = {key: instructions(lines) for key, lines in code.items()}
    names = readable({name for _, name in used})
    faults = faults_of_build(build, architectures, used)
    found = [*hazards(code), *excess_barriers(code)]
    faults += [f"{names.get(name, name)} on {arch}: {text}" for (arch, name), text in found]
    lines = [
        f"Registers per thread by GPU architecture, and Hopper's instructions. nvcc {build.nvcc}. {origin()}",
        "",
        f"| kernel | {' | '.join((*architectures, *HOPPER))} |",
        "|---" * (1 + len(architectures) + len(HOPPER)) + "|",
    ]
    for name in sorted(names, key=lambda symbol: names[symbol]):
        registers = [used.get((arch, name), ("",))[0] for arch in architectures]
        hopper = [sum(counted.get((arch, name), Counter[str]())[word] for arch in architectures) for word in HOPPER]
        lines.append(f"| {names[name]} | {' | '.join(str(count or '') for count in (*registers, *hopper))} |")
        if names[name].startswith("attention") and not all(hopper):
            faults.append(f"{names[name]} contains {dict(zip(HOPPER, hopper, strict=True))}")
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(faults), file=sys.stderr)
    return int(bool(faults))


def without_kernels(required: bool) -> str:
    """Return a sentence for a library without CUDA C++ kernels: why, and if they are required what to type instead."""
    reason = native.UNAVAILABLE_REASON or cuda_build.summary()
    if not required:
        return f"the library has no CUDA C++ kernels, so there is nothing to check: {reason}"
    return (
        f"the library has no CUDA C++ kernels, which --required demands ({reason}): build them with "
        "`NVCC=/path/to/nvcc python setup.py build_ext --inplace`, or leave --required out"
    )


def faults_of_build(build: cuda_build.CudaBuild, architectures: list[str], used: Resources) -> list[str]:
    """Return a line for each source that was not built or is slow, each spill, and each target without code."""
    faults = [f"{source}.cu was not built: {failure['error']}" for source, failure in build.missing.items()]
    faults += [f"{source}.cu: {line}" for source, lines in build.slow.items() for line in lines]
    faults += [f"{name} on {arch} spills {spilled} bytes" for (arch, name), (_, spilled) in used.items() if spilled]
    built = {arch for arch, _ in used}
    return faults + [f"there is no kernel for {arch}" for arch in architectures if arch not in built]


def resources(lines: list[str]) -> Resources:
    """Return the registers and spilled bytes of each kernel, from `cuobjdump --dump-resource-usage`."""
    found, arch, name = {}, "", ""
    for line in lines:
        if match := re.search(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) .*LOCAL:(\d+)", line):
            found[arch, name] = int(match[1]), int(match[2])
    return found


def listings(lines: list[str]) -> dict[Key, list[str]]:
    """Return the listing of each kernel, from `cuobjdump --dump-sass`."""
    found: dict[Key, list[str]] = {}
    listing: list[str] = []
    arch = ""
    for line in lines:
        if match := re.search(r"(?:arch = |code for )(\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            listing = found.setdefault((arch, match[1]), [])
        else:
            listing.append(line)
    return found


def instructions(listing: list[str]) -> Counter[str]:
    """Return how often each of Hopper's instructions occurs."""
    pattern = re.compile(r"\b(" + "|".join(HOPPER) + r")\b")
    return Counter(match[1] for line in listing if (match := pattern.search(line)))


def hazards(code: dict[Key, list[str]]) -> list[tuple[Key, str]]:
    """Return each hazard of a pending wgmma, and the kernel that has it."""
    with_wgmma = {key: "\n".join(listing) for key, listing in code.items() if any("HGMMA" in line for line in listing)}
    return [(key, text) for key, listing in with_wgmma.items() for text in sass.wgmma_hazards(sass.parse(listing))]


def excess_barriers(code: dict[Key, list[str]]) -> list[tuple[Key, str]]:
    """Return each kernel whose blocks reserve too many barriers, and a line that says so."""
    used = {key: sass.barriers(sass.parse("\n".join(listing))) for key, listing in code.items()}
    return [(key, text) for key, count in used.items() for text in occupancy.excess_barriers(count, key[0])]


def cuobjdump(option: str, file: Path | None = None) -> list[str]:
    """Return the lines that cuobjdump prints about a file, by default about the library."""
    program = shutil.which("cuobjdump")
    if program is None:
        import triton

        program = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    ran = subprocess.run([program, option, file or native.path()], capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def readable(mangled: set[str]) -> dict[str, str]:
    """Return, by symbol, the name of each kernel with its template arguments."""
    symbols = sorted(mangled)
    ran = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = (re.sub(r"^void |bertfast::(cuda::)?|\((?!int\)|bool\)).*$", "", line) for line in ran.stdout.splitlines())
    return {symbol: re.sub(r"\((?:int|bool)\)| (?=>)", "", name) for symbol, name in zip(symbols, names, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
