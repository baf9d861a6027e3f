"""Measure the memory of inference on a CPU over many batches of changing shapes, compared with transformers.

    python -m bench.end_to_end.memory_over_time [--batches 20000] [--size tiny] [--lines 1000000] [--results FOLDER]

An encoder with random weights embeds padded batches of 1 to 16 sequences of 3 to 64 tokens, in fp32 and under bf16
autocast, in both libraries, each in its own process; its resident memory is read after 200 batches and at the end.
`bertfast predict` and `bertfast embed` then read files of a fifth of the lines and of all lines of 1 to 24 words; their
peak memory is compared. FOLDER gets memory_over_time-SIZE.json and memory_over_time-commands.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers

import bertfast
from bench.end_to_end.growth import peak_memory
from bench.harness import require_clean_tree, result_parser, write_result
from bertfast.cli.main import main as run_command
from bertfast.data.tokenizer import save_tokenizer, train_tokenizer
from bertfast.runtime.malloc import resident_memory

SIZES: dict[str, dict[str, Any]] = {  # of a BertConfig
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
SETTLED = 200  # batches after which memory should hardly grow
VOCAB_SIZE, MAX_ROWS, MAX_LENGTH, MAX_WORDS = 1024, 16, 64, 24
IMPLEMENTATIONS, PRECISIONS = ("transformers", "bertfast"), ("fp32", "bf16")


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--batches", type=int, default=20_000, help="number of batches; 0: none")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="size of the model")
    parser.add_argument("--lines", type=int, default=1_000_000, help="lines of text for the commands; 0: none")
    parser.add_argument("--point", nargs=2, metavar=("NAME", "PRECISION"), help="run only this and print bytes")
    parser.add_argument("--command", nargs="+", metavar="ARGUMENT", help="run only this command and print bytes")
    arguments = parser.parse_args()
    if arguments.point:
        name, precision = arguments.point
        print(json.dumps(memory_of_batches(name, precision, arguments.size, arguments.batches)))
        return
    if arguments.command:
        name, *rest = arguments.command
        status = run_command([name, *(part.replace("+", "--", 1) if part[0] == "+" else part for part in rest)])
        print(peak_memory(), file=sys.stderr)
        raise SystemExit(status)
    require_clean_tree(arguments.results)
    setting: dict[str, Any] = {"size": arguments.size, "threads": torch.get_num_threads()}
    if arguments.batches:
        memory = {
            f"{name}-{precision}": _child(arguments, ["--point", name, precision])
            for precision in PRECISIONS
            for name in IMPLEMENTATIONS
        }
        values = setting | {"bytes_after_batches": memory}
        write_result(f"memory_over_time-{arguments.size}", values, arguments.results)
    if arguments.lines:
        values = setting | {"peak_bytes_by_lines": memory_of_commands(arguments.size, arguments.lines)}
        write_result("memory_over_time-commands", values, arguments.results)


def memory_of_batches(name: str, precision: str, size: str, batches: int) -> dict[int, int]:
    """Return the resident memory, in bytes, after SETTLED and after all batches."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB_SIZE, **SIZES[size])).eval()
    if name == "bertfast":
        bertfast.patch(model)
    generator, memory = np.random.default_rng(0), {}
    for batch in range(1, batches + 1):
        lengths = generator.integers(3, MAX_LENGTH + 1, generator.integers(1, MAX_ROWS + 1))
        mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None]).long()
        ids = torch.from_numpy(generator.integers(0, VOCAB_SIZE, tuple(mask.shape)))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model(input_ids=ids, attention_mask=mask)
        if batch in (SETTLED, batches):
            memory[batch] = resident_memory()
    return memory


def memory_of_commands(size: str, lines: int) -> dict[str, dict[int, int]]:
    """Return the peak memory, in bytes, of each command and precision by number of lines."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        words = [f"word{index}" for index in range(500)]
        save_tokenizer(train_tokenizer([" ".join(words)] * 20, VOCAB_SIZE), folder / "model")
        config = transformers.BertConfig(vocab_size=VOCAB_SIZE, **SIZES[size])
        transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
        counts, generator = (lines // 5, lines), np.random.default_rng(0)
        for count in counts:
            with (folder / f"{count}.txt").open("w", encoding="utf-8") as file:
                for _ in range(count):
                    file.write(" ".join(generator.choice(words, generator.integers(1, MAX_WORDS + 1))) + "\n")
        return {
            f"{command}-{precision}": {count: _command(folder, command, precision, count) for count in counts}
            for command in ("predict", "embed")
            for precision in PRECISIONS
        }


def _command(folder: Path, command: str, precision: str, count: int) -> int:
    arguments = [command, "+model-name-or-path", str(folder / "model"), "+precision", precision, "+device", "cpu"]
    if command == "embed":
        arguments += ["+output-dir", str(folder / f"vectors-{precision}-{count}")]
    program = [sys.executable, "-m", "bench.end_to_end.memory_over_time", "--command", *arguments]
    with (folder / f"{count}.txt").open("rb") as text:
        ran = subprocess.run(program, stdin=text, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if ran.returncode:
        raise SystemExit(ran.stderr.decode())
    print(command, precision, count, ran.stderr.split()[-1].decode(), flush=True)
    return int(ran.stderr.split()[-1])


def _child(arguments: Any, point: list[str]) -> dict[str, int]:
    program = [sys.executable, "-m", "bench.end_to_end.memory_over_time", *point]
    program += ["--size", arguments.size, "--batches", str(arguments.batches)]
    memory: dict[str, int] = json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    print(*point[1:], memory, flush=True)
    return memory


if __name__ == "__main__":
    main()
