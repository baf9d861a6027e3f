"""Tabulate the machine code that nvcc generated for the CUDA C++ kernels, and fail if it has faults.

    python -m bench.sass_model.compiled_cuda [--output bench/results/compiled_cuda.md]

For each kernel of the native library the table has registers per thread, and the number of Hopper's instructions:
wgmma (HGMMA) and loads by TMA (UTMALDG), which attention must contain on sm_90a. Spilled registers, serialised wgmma
and a source that failed to build, which cost an installation only speed or one operation, are faults here.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from bench.harness import RESULTS, origin, require_clean_tree
from bertfast.ops import cuda_build, native

HOPPER = ("HGMMA", "UTMALDG")  # attention contains both
Key = tuple[str, str]  # GPU architecture, kernel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "compiled_cuda.md", help="Markdown file for the table")
    output = parser.parse_args().output
    require_clean_tree(output)
    build = cuda_build.BUILD
    if native.UNAVAILABLE_REASON is not None or build is None or build.nvcc is None:
        reason = native.UNAVAILABLE_REASON or cuda_build.summary()
        print(f"the library has no CUDA C++ kernels, so there is nothing to check: {reason}", file=sys.stderr)
        return 0
    if build.reason is not None:
        print(cuda_build.summary(), file=sys.stderr)
        return 1
    targets = {target.removesuffix("+PTX") for targets in build.architectures.values() for target in targets}
    architectures = [f"sm_{target}" for target in sorted(targets, key=lambda name: (int(name.rstrip("af")), name))]
    used, counted = resources(), instructions()
    faults = [f"{source}.cu was not built: {failure['error']}" for source, failure in build.missing.items()]
    faults += [f"{source}.cu: {line}" for source, lines in build.slow.items() for line in lines]
    faults += [f"{name} on {arch} spills {spilled} bytes" for (arch, name), (_, spilled) in used.items() if spilled]
    faults += [f"there is no kernel for {arch}" for arch in sorted(set(architectures) - {arch for arch, _ in used})]
    lines = [
        f"Registers per thread by GPU architecture, and Hopper's instructions. nvcc {build.nvcc}. {origin()}",
        "",
        f"| kernel | {' | '.join((*architectures, *HOPPER))} |",
        "|---" * (1 + len(architectures) + len(HOPPER)) + "|",
    ]
    kernels = readable({name for _, name in used})
    for name in sorted(kernels, key=lambda symbol: kernels[symbol]):
        registers = [used.get((arch, name), ("",))[0] for arch in architectures]
        hopper = [sum(counted.get((arch, name), Counter[str]())[code] for arch in architectures) for code in HOPPER]
        lines.append(f"| {kernels[name]} | {' | '.join(str(count or '') for count in (*registers, *hopper))} |")
        if kernels[name].startswith("attention") and not all(hopper):
            faults.append(f"{kernels[name]} contains {dict(zip(HOPPER, hopper, strict=True))}")
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(faults), file=sys.stderr)
    return int(bool(faults))


def resources() -> dict[Key, tuple[int, int]]:
    """Return the registers per thread and the bytes that it spills."""
    found, arch, name = {}, "", ""
    for line in cuobjdump("--dump-resource-usage"):
        if match := re.search(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) .*LOCAL:(\d+)", line):
            found[arch, name] = int(match[1]), int(match[2])
    return found


def instructions() -> dict[Key, Counter[str]]:
    """Return how often each of Hopper's instructions occurs."""
    found: dict[Key, Counter[str]] = {}
    key, arch = ("", ""), ""
    for line in cuobjdump("--dump-sass"):
        if match := re.search(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            key = arch, match[1]
            found[key] = Counter()
        elif match := re.search(r"\b(" + "|".join(HOPPER) + r")\b", line):
            found[key][match[1]] += 1
    return found


def cuobjdump(option: str) -> list[str]:
    """Return the lines that cuobjdump prints about the library."""
    program = shutil.which("cuobjdump")
    if program is None:
        import triton

        program = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    ran = subprocess.run([program, option, native.path()], capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def readable(mangled: set[str]) -> dict[str, str]:
    """Return, by symbol, the name of each kernel with its template arguments."""
    symbols = sorted(mangled)
    ran = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = (re.sub(r"^void |bertfast::(cuda::)?|\((?!int\)|bool\)).*$", "", line) for line in ran.stdout.splitlines())
    return {symbol: re.sub(r"\((?:int|bool)\)| (?=>)", "", name) for symbol, name in zip(symbols, names, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
