"""Settings: flat names over nested groups, and checks of values against their declared ranges."""

import copy
import dataclasses
import importlib
import json
import math
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest

from bertfast.cli.flags import parse
from bertfast.cli.main import COMMANDS, main
from bertfast.runtime.settings import (
    Count,
    Fraction,
    Positive,
    Range,
    Settings,
    checked,
    flag,
    given,
    group_class,
    hints_of,
    range_of,
    settings_of,
)
from bertfast.tasks.registry import choose_task
from bertfast.training.finetune_settings import FinetuneSettings, Hyperparameters
from bertfast.training.pretrain_settings import PretrainSettings


@dataclass(frozen=True, kw_only=True)
class Optimizer(Settings):
    learning_rate: Positive = 1e-3
    betas: list[Fraction] = field(default_factory=lambda: [0.9, 0.999])
    name: Literal["adamw", "lamb", "muon"] = "adamw"


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    folder: str
    steps: Count | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)

    def validate(self) -> None:
        if self.steps == 13:
            raise ValueError("--steps must not be 13")


def test_flat_names_reach_the_groups():
    run = Run.of(folder="a", learning_rate=0.5, steps=3)
    assert run == Run(folder="a", steps=3, optimizer=Optimizer(learning_rate=0.5))
    assert run.flat() == {"folder": "a", "steps": 3, "learning_rate": 0.5, "betas": [0.9, 0.999], "name": "adamw"}
    assert Run.of(**run.flat()) == run


def test_replace_keeps_all_other_values():
    run = Run.of(folder="a", learning_rate=0.5, name="muon")
    changed = run.replace(folder="b", learning_rate=0.25)
    assert changed == Run.of(folder="b", learning_rate=0.25, name="muon")
    assert run.optimizer.learning_rate == 0.5


def test_a_whole_group_may_be_given_and_then_changed():
    run = Run.of(folder="a", optimizer=Optimizer(name="lamb"), learning_rate=2)
    assert run.optimizer == Optimizer(name="lamb", learning_rate=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"steps": 1.5}, "--steps must be an integer, got 1.5"),
        ({"steps": 13}, "--steps must not be 13"),
        ({"learning_rate": 0.0}, "--learning-rate must be more than 0, got 0.0"),
        ({"learning_rate": math.inf}, "--learning-rate must be finite, got inf"),
        ({"learning_rate": math.nan}, "--learning-rate must be finite, got nan"),
        ({"learning_rate": "1"}, "--learning-rate must be a number, got '1'"),
        ({"betas": [0.9, 1.5]}, "--betas must be from 0 to 1, got 1.5"),
        ({"name": "sgd"}, "--name must be adamw, lamb or muon, got 'sgd'"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_flag(values, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Run.of(folder="a", **values)
    with pytest.raises(ValueError, match=f"^{message}$"):
        Run.of(folder="a").replace(**values)


def test_an_unknown_name_is_refused_and_the_closest_one_suggested():
    with pytest.raises(TypeError, match=r"Run has no setting learning_rat; did you mean learning_rate\?"):
        Run.of(folder="a", learning_rat=1)


@pytest.mark.parametrize(
    ("limits", "text", "inside", "outside"),
    [
        (Range(0, 1), "from 0 to 1", (0, 0.5, 1), (-0.1, 1.1)),
        (Range(above=0, below=1), "more than 0 and less than 1", (0.5,), (0, 1)),
        (Range(2, below=5), "at least 2 and less than 5", (2, 4.9), (1, 5)),
        (Range(maximum=3), "at most 3", (-7, 3), (4,)),
        (Range(), "", (-1e300, 1e300), (math.inf, math.nan)),
    ],
)
def test_ranges_have_closed_and_open_ends(limits, text, inside, outside):
    assert str(limits) == text
    assert all(value in limits for value in inside)
    assert not any(value in limits for value in outside)


def test_a_range_is_found_in_optional_numbers_and_lists():
    assert range_of(Count | None) == range_of(list[Count]) == Range(1)
    assert range_of(Annotated[str, "note"]) is range_of(Literal["a"]) is None


def test_two_settings_of_one_name_are_an_error():
    @dataclass(frozen=True, kw_only=True)
    class Twice(Settings):
        learning_rate: Positive = 1.0
        optimizer: Optimizer = field(default_factory=Optimizer)

    with pytest.raises(TypeError, match="Twice has two settings called learning_rate"):
        settings_of(Twice)


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ("pretrain --output-dir o --train-file t --num-train-epochs", "--num-train-epochs"),
        ("finetune --model-name-or-path m --output-dir o --train-file t --num-train-epochs", "--num-train-epochs"),
        ("sweep --model-name-or-path m --output-dir o --train-file t --validation-file v --epochs", "--epochs"),
    ],
)
def test_epochs_have_a_maximum(arguments, flag, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments.split(), "1e308"]) == 1
    assert f"{flag} must be more than 0 and at most 1000000, got 1e+308" in capsys.readouterr().err.replace(
        "at most 1000000 and more than 0", "more than 0 and at most 1000000"
    )


def test_a_flag_that_is_required_cannot_be_left_out(capsys):
    assert main(["fill-mask", "m", ""]) == 1
    assert "TEXT is empty: give a value\n" in capsys.readouterr().err
    assert main(["pretrain", "--output-dir", "o", "--tokenizer-name", ""]) == 1
    assert "--tokenizer-name is empty: give a value, or leave it out" in capsys.readouterr().err


def test_a_part_with_thousands_of_digits_is_refused(capsys):
    arguments = ["prepare", "--output-dir", "o", "--train-file", "t", "--tokenizer-name", "v", "--part"]
    assert main([*arguments, "1/" + "9" * 5000]) == 1
    assert "--part must be i/n with 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("finetune {where} --lstm-layers 2", "--lstm-layers would have no effect: this belongs to --strategy feature"),
        (
            "evaluate --model-name-or-path m --validation-file v --objective mlm --task auto",
            "--task would have no effe",
        ),
        ("prepare --output-dir o --train-file t --tokenizer-name v --vocab_size 30528", "--vocab-size would have no"),
        ("prepare --output-dir o --train-file t --validation-file v --validation-split-percentage 5", "no effect"),
        ("pretrain --output-dir o --train-file t --init-from m --architecture bert", "--architecture would have no"),
        ("pretrain --output-dir o --train-file t --init-from m --preset small", "--preset and --init-from exclude"),
        ("pretrain --output-dir o --train-file t --objective ltr --mlm-probability 0.15", "--mlm-probability would"),
        ("pretrain --output-dir o --train-file t --second-phase-share 0.1", "there is no --second-phase-length"),
    ],
)
def test_a_typed_default_is_refused_like_another_value(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_text("sentence\tlabel\ngood\t1\n")
    arguments = line.format(where="--model-name-or-path m --output-dir o --train-file t").split()
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_what_is_typed_as_off_is_not_given():
    line = (
        "--model-name-or-path m --output-dir o --train-file t --no-random-init --init-from-task f --features-dir None"
    )
    assert parse("finetune", FinetuneSettings, line.split()).model.init_from_task == "f"
    line = "--output-dir o --train-file t --max-steps 0 --minutes 1 --tokenizer-name v --no-cased"
    assert parse("pretrain", PretrainSettings, line.split()).duration.minutes == 1


def test_a_typed_default_without_effect_on_the_task_is_refused():
    line = "--model-name-or-path m --output-dir o --train-file t --task sst-2 --tag-column -1"
    with pytest.raises(ValueError, match="--tag-column would have no effect: the task is sst-2"):
        choose_task(parse("finetune", FinetuneSettings, line.split()))


def test_typed_defaults_are_kept_where_other_values_are_replaced():
    line = "--output-dir o --train-file t --second-phase-length 256 --second-phase-share 0.1"
    settings = parse("pretrain", PretrainSettings, line.split())
    assert settings == PretrainSettings.of(**settings.flat())
    with pytest.raises(ValueError, match="--second-phase-share would have no effect"):
        settings.replace(second_phase_length=0)
    assert not PretrainSettings.of(**settings.flat()).replace(second_phase_length=0).batch.second_phase_length


@dataclass(frozen=True, kw_only=True)
class Everything(Settings):
    title: str = "a"
    flag: bool = False
    file: str | None = None
    files: list[str] = field(default_factory=list)
    sizes: list[Count] = field(default_factory=list)
    words: tuple[str, ...] = ()
    rate: Annotated[float, Range()] = 0.5
    plain: int = 1
    optimizer: Optimizer = field(default_factory=Optimizer)


def built(how: str, **values) -> Everything:
    """Return settings that are built in one of the ways in which Python can."""
    if how == "replace":
        return Everything().replace(**values)
    if how == "dataclasses.replace":
        return dataclasses.replace(Everything(), **values)
    return Everything.of(**values) if how == "of" else Everything(**values)


WAYS = ["constructor", "of", "replace", "dataclasses.replace"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"title": Path("a/b"), "file": Path("c")}, {"title": "a/b", "file": "c"}),
        ({"files": [Path("a"), "b"]}, {"files": ["a", "b"]}),
        ({"files": "text.txt"}, {"files": ["text.txt"]}),
        ({"files": Path("text.txt"), "words": "conv"}, {"files": ["text.txt"], "words": ("conv",)}),
        ({"sizes": 32}, {"sizes": [32]}),
        ({"sizes": (32, np.int64(16))}, {"sizes": [32, 16]}),
        ({"sizes": range(1, 3)}, {"sizes": [1, 2]}),
        ({"sizes": np.array([32, 16])}, {"sizes": [32, 16]}),
        ({"sizes": np.array(32)[()]}, {"sizes": [32]}),
        ({"words": np.array(["conv", "lin"])}, {"words": ("conv", "lin")}),
        ({"rate": np.float32(0.25), "plain": np.int32(3)}, {"rate": 0.25, "plain": 3}),
        ({"rate": 1}, {"rate": 1}),
    ],
)
def test_values_are_kept_as_json_can_hold_them(values, kept, how):
    settings = built(how, **values)
    assert {name: getattr(settings, name) for name in kept} == kept
    assert {name: type(getattr(settings, name)) for name in kept} == {name: type(kept[name]) for name in kept}
    loaded = json.loads(json.dumps(settings.flat()))
    assert Everything.of(**loaded) == settings


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flag": "yes"}, "--flag must be True or False, got 'yes'"),
        ({"flag": 1}, "--flag must be True or False, got 1"),
        ({"flag": None}, "--flag must be True or False, got None"),
        ({"title": 3}, "--title must be a string, got 3"),
        ({"title": b"a"}, "--title must be a string, got b'a'"),
        ({"title": None}, "--title must be a string, got None"),
        ({"file": ["a"]}, r"--file must be a string, got \['a'\]"),
        ({"files": ["a", 3]}, "--files must be a string, got 3"),
        ({"files": b"ab"}, "--files must be a string, got b'ab'"),
        ({"files": None}, "--files must be a string, got None"),
        ({"sizes": "32"}, "--sizes must be an integer, got '32'"),
        ({"sizes": True}, "--sizes must be an integer, got True"),
        ({"sizes": {8}}, r"--sizes must be a list of integers, got \{8\}"),
        ({"sizes": np.ones((1, 2))}, r"--sizes must be a list of integers, got array\(\[\[1., 1.\]\]\)"),
        ({"file": ""}, "--file is empty: give a value"),
        ({"files": ["a", ""]}, "--files is empty: give a value"),
        ({"sizes": [8, 0]}, "--sizes must be at least 1, got 0"),
        ({"rate": "0.5"}, "--rate must be a number, got '0.5'"),
        ({"rate": np.nan}, "--rate must be finite, got nan"),
        ({"plain": 1.0}, "--plain must be an integer, got 1.0"),
        ({"optimizer": "adamw"}, "optimizer must be Optimizer, got 'adamw'"),
    ],
)
def test_values_of_another_type_are_refused(values, message, how):
    with pytest.raises(ValueError, match=f"^{message}$"):
        built(how, **values)


@pytest.mark.parametrize("how", WAYS)
def test_an_iterator_is_taken_as_a_list(how):
    assert built(how, sizes=(size for size in (32, 16))).sizes == [32, 16]


def test_a_task_and_an_output_folder_are_checked_when_settings_are_built():
    where = {"model_name_or_path": "m", "train_file": "a.tsv", "output_dir": "o"}
    with pytest.raises(ValueError, match="there is no task 'embeddings'; choose --task from auto, sequence-class"):
        FinetuneSettings.of(**where, task="embeddings")
    with pytest.raises(ValueError, match=r"^--output-dir is empty: give a value$"):
        FinetuneSettings.of(**where | {"output_dir": ""})


def settings_classes() -> list[type[Settings]]:
    """Return the settings of all commands and their groups."""
    classes = []
    for command in COMMANDS.values():
        program = getattr(importlib.import_module(f"bertfast.{command.module}"), command.settings)
        classes += [program, *filter(None, map(group_class, hints_of(program).values()))]
    return [*dict.fromkeys(classes)]


@pytest.mark.parametrize("settings_class", settings_classes(), ids=lambda known: known.__name__)
def test_every_setting_of_every_command_has_a_type_that_is_checked(settings_class):
    for name, hint in hints_of(settings_class).items():
        if group_class(hint) is None:
            assert settings_of(settings_class)[name].hint == hint
            with pytest.raises(ValueError, match=rf"^{flag(name)} must be .*, got \{{'a'\}}$"):
                checked(name, hint, {"a"})


def test_what_a_command_line_refuses_together_is_refused_from_python():
    where = {"model_name_or_path": "m", "train_file": "t", "output_dir": "o"}
    rivals = "--num-train-epochs and --max-steps exclude each other: give only one of them"
    with pytest.raises(ValueError, match=f"^{rivals}$"):
        FinetuneSettings.of(**where, max_steps=2, num_train_epochs=3)
    with pytest.raises(ValueError, match=f"^{rivals}$"):
        FinetuneSettings.of(**where, max_steps=2).replace(num_train_epochs=3.0)
    with pytest.raises(ValueError, match=f"^{rivals}$"):
        FinetuneSettings.of(**where, hyperparameters=Hyperparameters(max_steps=2), num_train_epochs=3)
    with pytest.raises(ValueError, match=f"^{rivals}$"):
        Hyperparameters(max_steps=2, num_train_epochs=3)
    with pytest.raises(ValueError, match=f"^{rivals}$"):
        dataclasses.replace(Hyperparameters(max_steps=2), num_train_epochs=4)
    with pytest.raises(ValueError, match="--lstm-layers would have no effect"):
        FinetuneSettings.of(**where, lstm_layers=2)
    assert FinetuneSettings.of(**where, max_steps=None, num_train_epochs=3).hyperparameters.max_steps is None


def test_in_a_copy_of_all_values_the_defaults_do_not_count_as_given():
    where = {"model_name_or_path": "m", "train_file": "t", "output_dir": "o"}
    settings = FinetuneSettings.of(**where, max_steps=2)
    for copied in (
        FinetuneSettings.of(**settings.flat()),
        settings.replace(output_dir="o"),
        dataclasses.replace(settings, output_dir="o"),
        pickle.loads(pickle.dumps(settings)),
        copy.deepcopy(settings),
    ):
        assert copied == settings
        assert given(copied.hyperparameters) == ["--max-steps"]
