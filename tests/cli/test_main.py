"""The command line: flags, YAML files, recipes by name, and the messages for invalid input."""

import importlib
import importlib.metadata
import re
import shlex
import subprocess
import sys

import pytest
import yaml

import bertfast
from bertfast.cli.flags import parse
from bertfast.cli.main import COMMANDS, main
from bertfast.cli.recipes import recipe_names, recipes_folder
from bertfast.runtime.settings import range_of, settings_of
from bertfast.tasks.registry import TASKS
from bertfast.training.pretraining import PretrainSettings

NUMBER = re.compile(r"\b(int|float)\b")


def test_flags_accept_dashes_underscores_and_lists():
    arguments = ["--output-dir", "x", "--train_file", "a", "b", "--max-seq-length", "64", "--resume"]
    settings = parse("pretrain", PretrainSettings, arguments)
    assert settings.corpus.train_file == ["a", "b"]
    assert settings.sampling.max_seq_length == 64
    assert settings.checkpoint.resume


def test_a_yaml_file_uses_flag_names_and_later_flags_override_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: x\nlearning_rate: 1e-3\ntrain_file: [a, b]\nwhole_word: true\nmax_steps: 7\n")
    settings = parse("pretrain", PretrainSettings, ["--config", str(path), "--max-steps", "9", "--no-whole-word"])
    assert settings.output_dir == "x"
    assert settings.optimizer.learning_rate == 1e-3
    assert settings.corpus.train_file == ["a", "b"]
    assert (settings.duration.max_steps, settings.sampling.whole_word) == (9, False)


def test_an_unknown_flag_is_refused_and_the_closest_one_suggested(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "--output-dir", "x", "--learning-rat", "1"])
    assert stopped.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


def test_an_unknown_entry_of_a_yaml_file_is_refused_in_one_sentence(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: x\nlearning_rat: 1\n")
    assert main(["pretrain", "--config", str(path)]) == 1
    message = f"--config {path}: bertfast pretrain has no setting learning_rat; did you mean learning-rate?"
    assert capsys.readouterr().err == f"bertfast pretrain: {message}\n"


@pytest.mark.parametrize("given", ["flag", "yaml"])
def test_a_number_out_of_its_range_is_refused_with_flag_value_and_range(given, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: x\nmlm-probability: 1.5\n")
    arguments = ["--config", str(path)] if given == "yaml" else ["--output-dir", "x", "--mlm-probability", "1.5"]
    assert main(["pretrain", *arguments]) == 1
    assert capsys.readouterr().err == "bertfast pretrain: --mlm-probability must be from 0 to 1, got 1.5\n"


def test_help_has_groups_and_ranges(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("optimizer options", "Fraction of a sample's tokens to predict. Range: from 0 to 1."):
        assert part in text


@pytest.mark.parametrize("flag", ["--learning-rate", "--num-train-epochs", "--seed"])
def test_a_command_accepts_only_flags_that_it_uses(flag, capsys):
    required = ["--model-name-or-path", "m", "--train-file", "t", "--validation-file", "v", "--output-dir", "o"]
    with pytest.raises(SystemExit):
        main(["sweep", *required, flag, "1"])
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prepare --output-dir o --tokenizer-name t --cased", "--cased would have no effect: --tokenizer-name gives"),
        (
            "prepare --output-dir o --train-file t --validation-file v --validation-split-percentage 7",
            "--validation-split-percentage would have no effect: --validation-file gives the text",
        ),
        ("pretrain --output-dir o --init-from m --vocab-size 640", "--vocab-size would have no effect: the model of"),
        ("pretrain --output-dir o --second-phase-share 0.3", "--second-phase-share would have no effect: there is no"),
        (
            "finetune --output-dir o --model-name-or-path m --train-file t --lstm-size 7",
            "--lstm-size would have no effect: this belongs to --strategy feature-based",
        ),
        (
            "evaluate --model-name-or-path m --validation-file v --objective mlm --task mnli --on-bad-rows skip",
            "--on-bad-rows and --task would have no effect: --objective mlm evaluates on plain text",
        ),
        ("sweep --output-dir o --model-name-or-path m --train-file t --seeds 1 2 1", "--seeds has 1 more than once"),
        ("reproduce --output-dir o --table 1 --data d --seeds 3 3", "--seeds has 3 more than once"),
        ("prepare --output-dir o --vocab-size 10000000", "--vocab-size must be from 64 to 1048576, got 10000000"),
        (f"prepare --output-dir o --processes {2**70}", f"--processes must be at most 2147483647, got {2**70}"),
    ],
)
def test_flags_without_effect_and_absurd_values_are_refused(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_declared_range(command):
    module = importlib.import_module(f"bertfast.{COMMANDS[command].module}")
    for setting in settings_of(getattr(module, COMMANDS[command].settings)).values():
        if NUMBER.search(str(setting.hint)):
            assert range_of(setting.hint) is not None, setting.name


def test_a_recipe_is_found_by_name_and_later_flags_override_it():
    settings = parse("pretrain", PretrainSettings, ["--config", "fast", "--output-dir", "x", "--max-steps", "9"])
    recipe = yaml.safe_load((recipes_folder() / "fast.yaml").read_text())
    assert settings.sampling.mlm_probability == recipe["mlm-probability"]
    assert settings.duration.max_steps == 9 != recipe["max-steps"]


@pytest.mark.parametrize(
    ("typed", "dropped"),
    [
        (["--second-phase-length", "0"], {"second_phase_share", "second_phase_rope_theta"}),
        (
            ["--minutes", "3", "--batch-ramp", "0", "--second-phase-length=0"],
            {"second_phase_share", "second_phase_rope_theta"},
        ),
        (["--init-from", "model"], {"architecture"}),
        (["--objective", "ltr"], {"mlm_probability"}),
    ],
)
def test_entries_of_a_recipe_that_a_typed_flag_disables_are_dropped(typed, dropped):
    defaults = PretrainSettings.of(output_dir="x").flat()
    recipe = parse("pretrain", PretrainSettings, ["--config", "modern", "--output-dir", "x"]).flat()
    found = parse("pretrain", PretrainSettings, ["--config", "modern", "--output-dir", "x", *typed]).flat()
    for name in dropped:
        assert found[name] == defaults[name]
    kept = {"max_seq_length", "tokens_per_batch", "optimizer", "learning_rate", "rope_theta"}
    assert {name: found[name] for name in kept} == {name: recipe[name] for name in kept}


def test_what_was_typed_or_contradicts_itself_in_a_file_is_refused(tmp_path):
    typed = ["--config", "modern", "--output-dir", "x", "--second-phase-length", "0", "--second-phase-share", "0.2"]
    with pytest.raises(ValueError, match=r"^--second-phase-share would have no effect: there is no"):
        parse("pretrain", PretrainSettings, typed)
    path = tmp_path / "run.yaml"
    path.write_text("second-phase-rope-theta: 160000\n")
    with pytest.raises(ValueError, match=r"^--second-phase-rope-theta would have no effect"):
        parse("pretrain", PretrainSettings, ["--config", str(path), "--output-dir", "x", "--max-steps", "3"])


def test_a_typed_none_undoes_the_entry_of_a_recipe():
    typed = ["--config", "modern", "--output-dir", "x", "--rope-theta", "None"]
    assert parse("pretrain", PretrainSettings, typed).model.rope_theta is None


def test_a_file_takes_precedence_over_a_recipe_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fast").write_text("output_dir: x\nmax_steps: 5\n")
    settings = parse("pretrain", PretrainSettings, ["--config=fast"])
    assert (settings.output_dir, settings.duration.max_steps) == ("x", 5)


@pytest.mark.parametrize("arguments", [["--config", "fastest"], ["--config=recipes/none.yaml"]])
def test_an_unknown_config_is_refused_and_the_recipes_are_listed(arguments, capsys):
    assert main(["pretrain", *arguments]) == 1
    error = capsys.readouterr().err
    assert "no such file or recipe" in error
    assert all(name in error for name in recipe_names())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: x\nname: [1, 2\nother: 3\n", r"--config z\.yaml, line 3: .+"),
        ("output_dir: a: b\n", r"--config z\.yaml, line 1: mapping values are not allowed here"),
        ("max-steps: 3\nname: x\nmax_steps: 4\n", r"--config z\.yaml, line 3: max_steps is given twice"),
        ("output_dir: \x00\n", r"--config z\.yaml: .*special characters are not allowed.*"),
        ("[" * 100_000, r"--config z\.yaml: too deeply nested; give `name: value` lines"),
        ("output-dir:\n", r"--config z\.yaml: output-dir is empty: give a value, or remove the line"),
        ("max-steps: null\n", r"--config z\.yaml: max-steps is empty: give a value, or remove the line"),
        ("train-file: [a, null]\n", r"--config z\.yaml, line 1: a value of the list is empty: write \"null\" in .*"),
        ("output-dir: 010\n", r"--config z\.yaml, line 1: 010 is read as 8: write \"010\" in quotes, or 8"),
        ("a: 1\nmax-steps: 1:30\n", r"--config z\.yaml, line 2: 1:30 is read as 90: write \"1:30\" in quotes, or 90"),
        ("minutes: 1:30.5\n", r"--config z\.yaml, line 1: 1:30.5 is read as 90.5: write \"1:30.5\" in quotes, .*"),
        ('output-dir: "a\\0"\n', r"--config z\.yaml, line 1: the character \\0 cannot be in a value: remove it"),
        ("- a\n- b\n", r"--config z\.yaml: must hold `name: value` lines, got \['a', 'b'\]"),
    ],
)
def test_a_malformed_yaml_file_is_refused_with_its_line(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "z.yaml").write_text(text)
    assert main(["pretrain", "--config", "z.yaml"]) == 1
    assert re.fullmatch(rf"bertfast pretrain: {message}\n", capsys.readouterr().err)


def test_a_setting_that_may_be_left_out_may_be_null_in_yaml(tmp_path):
    (tmp_path / "z.yaml").write_text("output-dir: '010'\ntokenizer-name: null\nmax-steps: 10\ndropout: 0.1\n")
    settings = parse("pretrain", PretrainSettings, ["--config", str(tmp_path / "z.yaml")])
    assert (settings.output_dir, settings.duration.max_steps) == ("010", 10)


def test_a_yaml_file_in_another_encoding_is_refused(tmp_path, capsys):
    path = tmp_path / "z.yaml"
    path.write_bytes("output_dir: café\n".encode("latin-1"))
    assert main(["pretrain", "--config", str(path)]) == 1
    assert f"--config {path}: not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize("pair", ["--minutes 1 --max-steps 2", "--max-steps=2 --num_train_epochs 3"])
def test_two_lengths_of_a_run_are_refused(pair, capsys):
    assert main(["pretrain", "--output-dir", "x", *pair.split()]) == 1
    assert "exclude each other: give only one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "typed", "length"),
    [
        ("cpu", "--max-steps 100", (100, None, None)),
        ("cpu", "--num_train_epochs=2", (0, 2, None)),
        ("fast", "--num-train-epochs 3", (0, 3, None)),
        ("speedrun", "--config cpu", (0, None, 20)),
        ("cpu", "", (0, None, 20)),
    ],
)
def test_a_length_after_a_recipe_replaces_that_of_the_recipe(recipe, typed, length):
    settings = parse("pretrain", PretrainSettings, ["--output-dir", "x", "--config", recipe, *typed.split()])
    duration = settings.duration
    assert (duration.max_steps, duration.num_train_epochs, duration.minutes) == length


def test_a_recipe_after_a_typed_length_does_not_replace_it(capsys):
    assert main(["pretrain", "--output-dir", "x", "--max-steps", "9", "--config", "cpu"]) == 1
    assert "--max-steps and --minutes exclude each other" in capsys.readouterr().err


def test_config_without_a_value_is_refused(capsys):
    assert main(["pretrain", "--config"]) == 1
    assert "--config requires a YAML file or the name of a recipe" in capsys.readouterr().err


def test_the_version_is_that_of_the_package_metadata(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bertfast {bertfast.__version__}\n"
    assert importlib.metadata.version("bertfast") == bertfast.__version__


def test_python_m_bertfast_is_the_command_line():
    for arguments, status, text in (
        (["--version"], 0, f"bertfast {bertfast.__version__}\n"),
        (["pretran"], 2, "bertfast: unknown command 'pretran'; did you mean 'pretrain'?\n"),
    ):
        ran = subprocess.run([sys.executable, "-m", "bertfast", *arguments], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout + ran.stderr) == (status, text)


def test_help_lists_every_command_without_importing_torch_or_transformers():
    code = (
        "import sys; from bertfast.cli.main import main; main(['--help']); "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *help_lines, imported = ran.stdout.splitlines()
    commands = help_lines[help_lines.index("Commands:") + 1 :]
    summaries = dict(line.split(maxsplit=1) for line in commands[: len(COMMANDS)])
    assert summaries == {name: command.summary for name, command in COMMANDS.items()}
    assert max(map(len, help_lines)) <= 100
    assert imported == "set()"


def test_dir_lists_exactly_the_public_names_all_of_which_exist():
    assert {name for name in dir(bertfast) if not name.startswith("__")} == set(bertfast.__all__)
    assert "__version__" in dir(bertfast)
    assert all(hasattr(bertfast, name) for name in dir(bertfast))


def test_operators_are_imported_on_first_use():
    code = (
        "import sys, bertfast; print({'torch', 'transformers'} & set(sys.modules)); "
        "print(bertfast.ops.attention.__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["set()", "attention"]


def test_training_functions_are_imported_on_first_use_and_are_those_of_the_commands():
    code = (
        "import sys, bertfast.training as training; print({'torch', 'transformers'} & set(sys.modules)); "
        "from bertfast.training import finetune, pretrain; print(finetune.__module__, pretrain.__module__); "
        "print(all(hasattr(training, name) for name in dir(training)), hasattr(training, 'finetuned'))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = [f"bertfast.{COMMANDS[name].module}" for name in ("finetune", "pretrain")]
    assert ran.stdout.splitlines() == ["set()", " ".join(modules), "True False"]


def test_an_unknown_command_is_refused_and_the_closest_one_suggested(capsys):
    assert main(["pretran"]) == 2
    assert "'pretrain'" in capsys.readouterr().err
    assert main(["features"]) == 2
    assert "did you mean 'embed'?" in capsys.readouterr().err


def test_a_user_error_is_printed_as_one_line(tmp_path, capsys):
    assert main(["prepare", "--output-dir", str(tmp_path), "--train-file", str(tmp_path / "nothing.txt")]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("bertfast prepare: ")
    assert "nothing.txt" in error
    assert "\n" not in error


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_each_of_its_flags(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(required)" in text or "(default:" in text
    # A flag without a description would show its default right after its type.
    assert "STR (default" not in text
    assert "INT (default" not in text
    assert "FLOAT (default" not in text
    # An empty default says nothing, and "none" is a value only where it is listed.
    assert "(default: )" not in text
    assert "(default: None)" not in text
    assert "{None}" not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_command_is_valid_and_shown_by_its_help(command, capsys):
    module, settings, _, summary, example = COMMANDS[command]
    settings_class = getattr(importlib.import_module(f"bertfast.{module}"), settings)
    assert isinstance(parse(command, settings_class, shlex.split(example)), settings_class)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"{summary} Example: bertfast {command} {example}" in text


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (
            "finetune",
            "--model-name-or-path m --train-file t --output-dir o --eval-steps none",
            "an integer, got 'none'",
        ),
        ("pretrain", "--output-dir o --minutes soon", "--minutes: must be a number, got 'soon'"),
        (
            "sweep",
            "--model-name-or-path m --train-file t --output-dir o --seeds 1 1.5",
            "must be an integer, got '1.5'",
        ),
    ],
)
def test_a_value_that_is_no_number_is_refused_in_one_sentence(command, flags, message, capsys):
    with pytest.raises(SystemExit):
        main([command, *flags.split()])
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error
    assert "no type matching" not in error
    assert "typing." not in error


def test_predict_has_no_flags_that_it_does_not_read(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--label-column" not in text
    assert "--n-best" not in text
    assert "Range: any integer." in text
    assert "Range: any finite number." in text


def test_the_help_of_pretrain_names_the_recipes(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    assert (
        f"--config RECIPE reads those of an installed recipe: {', '.join(recipe_names())}." in capsys.readouterr().out
    )


def test_help_lists_every_task(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    words = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert words >= set(TASKS)
