"""Tabulate the machine code that nvcc made of the CUDA C++ kernels, and fail if there is a fault in it.

    python -m bench.sass_model.compiled_cuda > bench/results/compiled_cuda.md

Of each kernel in the compiled library the table has registers, and Hopper's instructions: wgmma (HGMMA) and loads by
TMA (UTMALDG), which attention must have on sm_90a. Spilled registers, serialised wgmma and a source that did not build,
which cost an installation only speed or one operation, are errors here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from bench.harness import origin
from bertfast.ops import cuda_build, native

HOPPER = ("HGMMA", "UTMALDG")  # instructions of which attention has some
Key = tuple[str, str]  # arch, kernel


def main() -> int:
    build = cuda_build.BUILD
    if native.UNAVAILABLE_REASON is not None or build is None or build.nvcc is None:
        why = native.UNAVAILABLE_REASON or cuda_build.summary()
        print(f"the library here has no kernels in CUDA C++, nothing to look at: {why}", file=sys.stderr)
        return 0
    if build.reason is not None:
        print(cuda_build.summary(), file=sys.stderr)
        return 1
    targets = {target.removesuffix("+PTX") for targets in build.architectures.values() for target in targets}

    def by_number(target: str) -> tuple[int, str]:
        return int(target.rstrip("af")), target

    architectures = tuple(
        f"sm_{target}" for target in sorted(targets, key=lambda target: (int(target.rstrip("af")), target))
    )
    used, counted = resources(), instructions()
    faults = [f"{source}.cu was not built: {why['error']}" for source, why in build.missing.items()]
    faults += [f"{source}.cu: {line}" for source, lines in build.slow.items() for line in lines]
    faults += [f"{name} on {arch} spills {spilled} bytes" for (arch, name), (_, spilled) in used.items() if spilled]
    kernels = readable({name for _, name in used})
    print(f"Registers of a thread on each GPU architecture, and Hopper's instructions. nvcc {build.nvcc}. {origin()}\n")
    print(f"| kernel | {' | '.join((*architectures, *HOPPER))} |")
    print("|---" * (1 + len(architectures) + len(HOPPER)) + "|")
    for name in sorted(kernels, key=kernels.get):
        registers = [used.get((arch, name), ("",))[0] for arch in architectures]
        hopper = [sum(counted.get((arch, name), {}).get(word, 0) for arch in architectures) for word in HOPPER]
        print(f"| {kernels[name]} | {' | '.join(str(count or '') for count in (*registers, *hopper))} |")
        if kernels[name].startswith("attention") and not all(hopper):
            faults.append(f"{kernels[name]} has {dict(zip(HOPPER, hopper, strict=True))}")
    if missing := set(architectures) - {arch for arch, _ in used}:
        faults.append(f"there is nothing for {', '.join(sorted(missing))}")
    print("\n".join(faults), file=sys.stderr)
    return int(bool(faults))


def resources() -> dict[Key, tuple[int, int]]:
    """Registers of a thread, and bytes that it spills."""
    found, arch, name = {}, "", ""
    for line in cuobjdump("--dump-resource-usage"):
        if match := re.search(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) .*LOCAL:(\d+)", line):
            found[arch, name] = int(match[1]), int(match[2])
    return found


def instructions() -> dict[Key, Counter]:
    """How many there are of each of Hopper's."""
    found, key, arch = {}, ("", ""), ""
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
    """The lines that CUDA's tool prints of the library."""
    program = shutil.which("cuobjdump")
    if program is None:
        import triton

        program = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    ran = subprocess.run([program, option, native.path()], capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def readable(mangled: set[str]) -> dict[str, str]:
    """A kernel's name, and what it is instantiated for, of each symbol."""
    mangled = sorted(mangled)
    ran = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = (re.sub(r"^void |bertfast::(cuda::)?|\((?!int\)|bool\)).*$", "", line) for line in ran.stdout.splitlines())
    return {symbol: re.sub(r"\((?:int|bool)\)| (?=>)", "", name) for symbol, name in zip(mangled, names, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
