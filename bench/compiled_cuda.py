"""What nvcc made of the kernels in CUDA C++, for chips that are not here: a table, and an error where it is not right.

    python bench/compiled_cuda.py > bench/results/compiled_cuda.md

Of each kernel in the compiled library the table has registers, memory of a thread, and Hopper's instructions: products
of warpgroups (HGMMA) and loads by TMA (UTMALDG), which attention must have on sm_90a. nvcc refuses spills already.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from bertfast import compiled

sys.path.insert(0, str(Path(__file__).parent))
from harness import origin

CHIPS = ("sm_80", "sm_90", "sm_90a", "sm_100", "sm_120")
HOPPER = ("HGMMA", "UTMALDG")  # instructions of which attention has some
Key = tuple[str, str]  # chip, kernel


def main() -> int:
    if compiled.ABSENT is not None or not compiled.runs("cuda_attention_forward", torch.device("cuda")):
        print("the library here has no kernels in CUDA C++: nothing to look at", file=sys.stderr)
        return 0
    used, counted = resources(), instructions()
    faults = [f"{name} on {chip} spills {spilled} bytes" for (chip, name), (_, spilled) in used.items() if spilled]
    kernels = readable({name for _, name in used})
    print(f"Registers of a thread on each chip, and Hopper's instructions; nothing spills. {origin()}\n")
    print(f"| kernel | {' | '.join((*CHIPS, *HOPPER))} |")
    print("|---" * (1 + len(CHIPS) + len(HOPPER)) + "|")
    for name in sorted(kernels, key=kernels.get):
        registers = [used.get((chip, name), ("",))[0] for chip in CHIPS]
        hopper = [sum(counted.get((chip, name), {}).get(word, 0) for chip in CHIPS) for word in HOPPER]
        print(f"| {kernels[name]} | {' | '.join(str(count or '') for count in (*registers, *hopper))} |")
        if kernels[name].startswith("attention") and not all(hopper):
            faults.append(f"{kernels[name]} has {dict(zip(HOPPER, hopper, strict=True))}")
    if missing := set(CHIPS) - {chip for chip, _ in used}:
        faults.append(f"there is nothing for {', '.join(sorted(missing))}")
    print("\n".join(faults), file=sys.stderr)
    return int(bool(faults))


def resources() -> dict[Key, tuple[int, int]]:
    """Registers of a thread, and bytes that it spills."""
    found, chip, name = {}, "", ""
    for line in cuobjdump("--dump-resource-usage"):
        if match := re.search(r"arch = (\w+)", line):
            chip = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) .*LOCAL:(\d+)", line):
            found[chip, name] = int(match[1]), int(match[2])
    return found


def instructions() -> dict[Key, Counter]:
    """How many there are of each of Hopper's."""
    found, key, chip = {}, ("", ""), ""
    for line in cuobjdump("--dump-sass"):
        if match := re.search(r"arch = (\w+)", line):
            chip = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            key = chip, match[1]
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
    ran = subprocess.run([program, option, compiled.path()], capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def readable(mangled: set[str]) -> dict[str, str]:
    """A kernel's name, and what it is instantiated for, of each symbol."""
    mangled = sorted(mangled)
    ran = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = (re.sub(r"^void |bertfast::(cuda::)?|\((?!int\)|bool\)).*$", "", line) for line in ran.stdout.splitlines())
    return {symbol: re.sub(r"\((?:int|bool)\)| (?=>)", "", name) for symbol, name in zip(mangled, names, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
