"""Measure the memory of inference on a CPU over many batches of changing shapes, compared with transformers.

    python -m bench.end_to_end.memory_over_time [--batches 20000] [--size tiny | --model FOLDER] [--lines 1000000]
        [--results FOLDER]

An encoder, of which --size chooses the size of random weights and --model a folder with a BERT such as
build/minilm/*/model, embeds padded batches of 1 to 16 sequences of 3 to 64 tokens, in fp32 and under bf16 autocast, in
both libraries, each in its own process; its resident memory is read after 200 batches and at the end.
`bertfast predict` and `bertfast embed` then read files of a fifth of the lines and of all lines of 1 to 24 words; their
peak memory is compared. The folder of --results gets memory_over_time-NAME.json and memory_over_time-commands.json, or
memory_over_time-commands-NAME.json with --model.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers

import bertfast
from bench.arguments import result_parser
from bench.points import peak_memory
from bench.result_files import require_clean_tree, write_result
from bertfast.cli.main import main as run_command
from bertfast.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from bertfast.runtime.malloc import resident_memory

SIZES: dict[str, dict[str, Any]] = {  # of a BertConfig
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
SETTLED = 200  # batches after which memory should hardly grow
VOCAB_SIZE, MAX_ROWS, MAX_LENGTH, MAX_WORDS, WORDS = 1024, 16, 64, 24, 500
IMPLEMENTATIONS, PRECISIONS = ("transformers", "bertfast"), ("fp32", "bf16")


@dataclass(frozen=True)
class Source:
    """Where the models come from.

    Attributes:
        size: Key of SIZES, for random weights.
        folder: Folder of a model with its tokenizer; None: random weights.
    """

    size: str
    folder: Path | None

    @property
    def name(self) -> str:
        """Name for result files: that of the size or of the folder, without a last part that is just `model`."""
        if self.folder is None:
            return self.size
        folder = self.folder.resolve()
        return folder.parent.name if folder.name == "model" else folder.name

    @property
    def flags(self) -> list[str]:
        """The flags of this program that name it."""
        return ["--size", self.size] if self.folder is None else ["--model", str(self.folder)]

    def encoder(self) -> Any:
        """Return transformers' model in evaluation mode."""
        if self.folder is not None:
            return transformers.BertModel.from_pretrained(self.folder).eval()
        torch.manual_seed(0)
        return transformers.BertModel(transformers.BertConfig(vocab_size=VOCAB_SIZE, **SIZES[self.size])).eval()

    def write_classifier(self, folder: Path) -> list[str]:
        """Write a sentence classifier with a random head and its tokenizer; return words of its vocabulary."""
        torch.manual_seed(0)
        classifier = transformers.BertForSequenceClassification
        if self.folder is None:
            words = [f"word{index}" for index in range(WORDS)]
            save_tokenizer(train_tokenizer([" ".join(words)] * 20, VOCAB_SIZE), folder)
            classifier(transformers.BertConfig(vocab_size=VOCAB_SIZE, **SIZES[self.size])).save_pretrained(folder)
            return words
        classifier.from_pretrained(self.folder).save_pretrained(folder)
        for pattern in ("tokenizer*.json", "vocab.txt", "special_tokens_map.json"):
            for path in self.folder.glob(pattern):
                shutil.copy(path, folder)
        words = sorted(token for token in load_tokenizer(folder).get_vocab() if token.isascii() and token.isalpha())
        return words[:: max(len(words) // WORDS, 1)]


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--batches", type=int, default=20_000, help="number of batches; 0: none")
    source_of = parser.add_mutually_exclusive_group()
    source_of.add_argument("--size", choices=SIZES, default="tiny", help="size of a model with random weights")
    source_of.add_argument("--model", type=Path, help="folder of a BERT and its tokenizer")
    parser.add_argument("--lines", type=int, default=1_000_000, help="lines of text for the commands; 0: none")
    parser.add_argument("--point", nargs=2, metavar=("NAME", "PRECISION"), help="run only this and print bytes")
    parser.add_argument("--command", nargs="+", metavar="ARGUMENT", help="run only this command and print bytes")
    arguments = parser.parse_args()
    if arguments.model is not None and not (arguments.model / "config.json").is_file():
        parser.error(f"--model {arguments.model}: has no config.json; name the folder of a BERT")
    source = Source(arguments.size, arguments.model)
    if arguments.point:
        name, precision = arguments.point
        print(json.dumps(memory_of_batches(name, precision, source, arguments.batches)))
        return
    if arguments.command:
        name, *rest = arguments.command
        status = run_command([name, *(part.replace("+", "--", 1) if part[0] == "+" else part for part in rest)])
        print(peak_memory(), file=sys.stderr)
        raise SystemExit(status)
    require_clean_tree(arguments.results)
    setting: dict[str, Any] = {"size": source.name, "threads": torch.get_num_threads()}
    if arguments.batches:
        memory = {
            f"{name}-{precision}": _child(source, arguments.batches, ["--point", name, precision])
            for precision in PRECISIONS
            for name in IMPLEMENTATIONS
        }
        values = setting | {"bytes_after_batches": memory}
        write_result(f"memory_over_time-{source.name}", values, arguments.results)
    if arguments.lines:
        values = setting | {"peak_bytes_by_lines": memory_of_commands(source, arguments.lines)}
        of_model = "" if source.folder is None else f"-{source.name}"
        write_result(f"memory_over_time-commands{of_model}", values, arguments.results)


def memory_of_batches(name: str, precision: str, source: Source, batches: int) -> dict[int, int]:
    """Return the resident memory, in bytes, after SETTLED and after all batches."""
    model = source.encoder()
    if name == "bertfast":
        bertfast.patch(model)
    generator, memory = np.random.default_rng(0), {}
    for batch in range(1, batches + 1):
        lengths = generator.integers(3, MAX_LENGTH + 1, generator.integers(1, MAX_ROWS + 1))
        mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None]).long()
        ids = torch.from_numpy(generator.integers(0, model.config.vocab_size, tuple(mask.shape)))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model(input_ids=ids, attention_mask=mask)
        if batch in (SETTLED, batches):
            memory[batch] = resident_memory()
    return memory


def memory_of_commands(source: Source, lines: int) -> dict[str, dict[int, int]]:
    """Return the peak memory, in bytes, of each command and precision by number of lines."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        words = source.write_classifier(folder / "model")
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


def _child(source: Source, batches: int, point: list[str]) -> dict[str, int]:
    program = [sys.executable, "-m", "bench.end_to_end.memory_over_time", *point]
    program += [*source.flags, "--batches", str(batches)]
    memory: dict[str, int] = json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    print(*point[1:], memory, flush=True)
    return memory


if __name__ == "__main__":
    main()
