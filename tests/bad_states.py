"""Folders that commands have written, of which a call finds one file damaged, and damaged recipes of tables."""

import os
import shutil
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import yaml
from bad_inputs import FILE_FAULTS, replace

from bertfast.cli.flags import flags_of
from bertfast.cli.main import main

DAMAGED = "damaged"
"""Name of the damaged folder in the folder of a call."""
TINY = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=32,max_position_embeddings=24"
_TEXT = {"train_file": ["text_good.txt"], "vocab_size": 128, "processes": 1}
_RUN = {"max_steps": 2, "save_steps": 1, "tokens_per_batch": 128, "max_seq_length": 16, "config_overrides": TINY}
_MODEL = {"model_name_or_path": "model", "device": "cpu"}
STATES: dict[str, dict[str, object]] = {  # by command: what it was given when it wrote its folder
    "prepare": _TEXT,
    "pretrain": _TEXT | _RUN | {"device": "cpu"},
    "finetune": _MODEL | {"train_file": "tsv_good.tsv", "num_train_epochs": 0.2},
    "sweep": _MODEL
    | {"train_file": "conll_good.conll", "validation_file": "conll_good.conll", "strategy": "feature-based"}
    | {"lstm_size": 8, "lstm_layers": 1}
    | {"epochs": [0.2], "batch_sizes": [8], "learning_rates": [1e-4]},
    "embed": _MODEL | {"input_file": "text_good.txt", "texts_per_part": 4},
    "evaluate": _MODEL | {"validation_file": "tsv_good.tsv"},
    "reproduce": _MODEL | {"table": 1, "data": ".", "recipes": "recipes_0", "num_train_epochs": 0.2},
}


@dataclass(frozen=True)
class Damage:
    """A damage to the folder that a command has written.

    Attributes:
        command: The command.
        position: Where the damaged file is among the files of the folder: 0 for the first, almost 1 for the last.
        fault: Name of the fault, see `FILE_FAULTS`.
    """

    command: str
    position: float
    fault: str

    def copy_to(self, folder: Path, states: Path, inputs: Path) -> None:
        """Copy the folder to `folder / DAMAGED` and damage it.

        Args:
            folder: Folder of a call.
            states: Folder of the intact folders; the command runs if its folder is missing.
            inputs: Folder of the inputs.
        """
        state = states / self.command
        if not state.exists():
            write_state(self.command, state, inputs)
        files = sorted(path.relative_to(state) for path in state.rglob("*") if path.is_file())
        file = files[int(self.position * len(files))]
        shutil.copytree(state, folder / DAMAGED)
        replace(folder / DAMAGED / file, FILE_FAULTS[self.fault]((state / file).read_bytes()))


def arguments_of(values: dict[str, object]) -> list[str]:
    """Return settings as flags."""
    return flags_of({name.replace("_", "-"): value for name, value in values.items()})


def write_state(command: str, state: Path, inputs: Path) -> None:
    """Run a command with intact inputs.

    Args:
        command: The command.
        state: Folder to write.
        inputs: Folder of the inputs.
    """
    arguments = arguments_of(STATES[command] | {"output_dir": str(state.absolute())})
    with chdir(inputs), open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        assert main([command, *arguments]) == 0


_COLUMN = {"task": "auto", "train-file": "tsv_good.tsv", "validation-file": "tsv_good.tsv", "metric": "accuracy"}
_TABLE = {"title": "Table 1", "paper": "a paper", "columns": {"A": _COLUMN}, "rows": [{"name": "a"}]}
_TABLES: Sequence[object] = [  # tables of recipes, the first one intact
    _TABLE,
    *({name: entry for name, entry in _TABLE.items() if name != absent} for absent in _TABLE),
    *(_TABLE | {name: 3} for name in _TABLE),
    *(_TABLE | {"columns": {"A": {name: x for name, x in _COLUMN.items() if name != absent}}} for absent in _COLUMN),
    *(_TABLE | {"columns": {"A": _COLUMN | {name: 3}}} for name in _COLUMN),
    _TABLE | {"columns": {"A": _COLUMN | {"metric": "f7"}}},
    _TABLE | {"columns": {"A": _COLUMN | {"task": "x"}}},
    _TABLE | {"columns": {"A": _COLUMN | {"times": "x"}}},
    _TABLE | {"columns": {"A": {"metric": "perplexity"}}},
    _TABLE | {"columns": {"A": None}},
    _TABLE | {"columns": {}},
    _TABLE | {"rows": []},
    _TABLE | {"rows": ["a"]},
    _TABLE | {"rows": [{"nom": "a"}]},
    _TABLE | {"rows": [{"name": 3}]},
    _TABLE | {"rows": [{"name": "a", "paper": 3}]},
    _TABLE | {"rows": [{"name": "a", "pretrain": {"objective": "mlm"}}]},
    _TABLE | {"rows": [{"name": "a", "finetune": {"max-sequence": 3}}]},
    _TABLE | {"rows": [{"name": "a", "finetune": {"max-seq-length": "x"}}]},
    _TABLE | {"rows": [{"name": "a", "finetune": [3]}]},
    *(
        _TABLE | {"columns": {"A": _COLUMN | {name: file}}}
        for name in ("train-file", "validation-file")
        for file in ("tsv_empty.tsv", "tsv_gzip_cut.tsv", "tsv_header.tsv", "squad_good.json", "tsv_lfs.tsv", ".")
    ),
    *("rows: [", "[]", "rows: &a [*a]", "\0"),
]


def write_recipes(folder: Path) -> list[str]:
    """Write folders with recipes of eight tables each; return their names."""
    names = []
    for index, table in enumerate(_TABLES):
        names.append(f"recipes_{index // 8}")
        (folder / names[-1]).mkdir(exist_ok=True)
        text = table if isinstance(table, str) else yaml.safe_dump(table)
        (folder / names[-1] / f"table-{index % 8 + 1}.yaml").write_text(text)
    return sorted({*names})
