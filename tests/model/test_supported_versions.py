"""Fused models refuse versions of transformers that they cannot run with, and say which one a family requires."""

import json

import pytest
from torch import nn
from transformers import PretrainedConfig

from bertfast.architectures.presets import preset_config
from bertfast.architectures.supported_versions import require_supported_version
from bertfast.architectures.unsupported import family_unsupported_reason
from bertfast.cli.main import main

NEEDED = r"requires transformers 5\.2 or later for it, and .* is installed: pip install --upgrade"


@pytest.mark.parametrize("version", ["4.57.0", "4.57.6", "5.2.0", "5.24.0", "5.25.0.dev0"])
def test_supported_versions_are_taken(version):
    require_supported_version(version)


@pytest.mark.parametrize("version", ["4.56.2", "5.0.0", "5.0.0rc1", "5.1.0", "6.0.0"])
def test_other_versions_are_refused_with_the_command_that_installs_one(version):
    with pytest.raises(ImportError, match=rf"{version} is installed: pip install"):
        require_supported_version(version)


@pytest.fixture
def without_rotary_families(monkeypatch):
    """Have the families that every supported version of transformers has."""
    older = ("bert", "roberta", "xlm_roberta", "camembert", "electra", "distilbert")
    for module in ("architectures", "models.files"):
        monkeypatch.setattr(f"bertfast.{module}.FAMILIES", older)


@pytest.mark.usefixtures("without_rotary_families")
@pytest.mark.parametrize(
    "command",
    [
        "pretrain --architecture modernbert --train-file text.txt --output-dir out",
        "pretrain --config modern --train-file text.txt --output-dir out",
        "pretrain --init-from model --train-file text.txt --output-dir out",
        "finetune --task sequence-classification --model-name-or-path model --train-file data.tsv --output-dir out",
        "finetune --task embedding --model-name-or-path model --train-file pairs.tsv --output-dir out",
        "predict --model-name-or-path model --input-file data.tsv",
        "evaluate --model-name-or-path model --validation-file data.tsv",
        "evaluate --objective mlm --model-name-or-path model --validation-file text.txt",
        "embed --model-name-or-path model --input-file text.txt --output-dir out",
        "fill-mask model [MASK]",
        "verify model",
        "bench model --input-file text.txt",
        "export model out",
    ],
)
def test_a_command_names_the_version_that_a_family_requires(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "modernbert"}))
    (tmp_path / "text.txt").write_text("A sentence.\n" * 20)
    (tmp_path / "data.tsv").write_text("sentence\tlabel\ngood\tpos\nbad\tneg\n")
    (tmp_path / "pairs.tsv").write_text("query\tanswer\na\tb\nc\td\n")
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 1
    error = capsys.readouterr().err
    assert "modernbert" in error
    assert "requires transformers 5.2 or later for it" in error
    assert 'is installed: pip install --upgrade "transformers>=5.2,<6"' in error


@pytest.mark.usefixtures("without_rotary_families")
def test_presets_and_reports_name_the_version_that_a_family_requires():
    with pytest.raises(ValueError, match=NEEDED):
        preset_config("base", architecture="modernbert")
    model = nn.Module()
    for model_type, needed in (("modernbert", "transformers 5.2 or later"), ("eurobert", "a later version of transf")):
        model.config = PretrainedConfig()
        model.config.model_type = model_type
        assert f"requires {needed}" in family_unsupported_reason(model)


def test_families_of_this_version_and_others_require_no_other_one():
    model = nn.Module()
    model.config = PretrainedConfig()
    model.config.model_type = "deberta"
    assert family_unsupported_reason(model) == "its attention scores depend on relative positions"
    with pytest.raises(ValueError, match="there are no presets of 'albert': use one of bert"):
        preset_config("base", architecture="albert")
