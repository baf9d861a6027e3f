"""The command line: flags, YAML files, and what is said when they are wrong."""

import pytest

from bertfast.cli.main import COMMANDS, main, parse
from bertfast.training.pretrain import PretrainSettings


def test_flags_take_either_dash_and_lists(tmp_path):
    arguments = ["--output-dir", "x", "--train_file", "a", "b", "--max-seq-length", "64", "--resume"]
    settings = parse("pretrain", PretrainSettings, arguments)
    assert settings.corpus.train_file == ["a", "b"]
    assert settings.sampling.max_seq_length == 64
    assert settings.resume


def test_a_yaml_file_holds_the_same_names_and_flags_after_it_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: x\nlearning_rate: 1e-3\ntrain_file: [a, b]\nwhole_word: true\nmax_steps: 7\n")
    settings = parse("pretrain", PretrainSettings, ["--config", str(path), "--max-steps", "9", "--no-whole-word"])
    assert (settings.output_dir, settings.learning_rate, settings.corpus.train_file) == ("x", 1e-3, ["a", "b"])
    assert (settings.max_steps, settings.sampling.whole_word) == (9, False)


@pytest.mark.parametrize("given", ["flag", "yaml"])
def test_an_unknown_name_is_refused_and_the_nearest_one_named(given, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: x\nlearning_rat: 1\n")
    arguments = ["--config", str(path)] if given == "yaml" else ["--output-dir", "x", "--learning-rat", "1"]
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", *arguments])
    assert stopped.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


def test_an_unknown_command_is_refused_and_the_nearest_one_named(capsys):
    assert main(["pretran"]) == 2
    assert "'pretrain'" in capsys.readouterr().err


def test_an_error_is_one_sentence(tmp_path, capsys):
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
    # A flag without a word on what it does shows its default right behind its type.
    assert "STR (default" not in text
    assert "INT (default" not in text
    assert "FLOAT (default" not in text
