"""The recipes are valid configurations."""

from pathlib import Path

import pytest

from bertfast.cli.flags import parse
from bertfast.training.pretrain_settings import PretrainSettings

RECIPES = {path.stem: path for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml")}


def settings(name: str) -> PretrainSettings:
    return parse("pretrain", PretrainSettings, ["--config", str(RECIPES[name]), "--output-dir", "somewhere"])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid(name):
    assert settings(name).output_dir == "somewhere"


def test_there_are_five_recipes():
    assert set(RECIPES) == {"paper", "fast", "cpu", "speedrun", "modern"}


def of_recipe(name: str, *arguments: str) -> PretrainSettings:
    return parse(
        "pretrain", PretrainSettings, ["--config", str(RECIPES[name]), "--output-dir", "somewhere", *arguments]
    )


def test_a_typed_architecture_drops_the_rotary_positions_of_a_recipe():
    settings = of_recipe("modern", "--architecture", "roberta")
    assert settings.model.architecture == "roberta"
    assert settings.model.rope_theta is settings.batch.second_phase_rope_theta is None
    assert settings.batch.second_phase_length == 8192
    assert of_recipe("modern").model.rope_theta == 10_000


@pytest.mark.parametrize("flags", ["--architecture roberta --rope-theta 500", "--architecture bert --rope-theta 500"])
def test_typed_rotary_positions_without_effect_are_refused(flags):
    with pytest.raises(
        ValueError, match=r"--rope-theta would have no effect: a (ro)?bert(a)? model has no rotary positions"
    ):
        of_recipe("modern", *flags.split())
    with pytest.raises(ValueError, match="--rope-theta would have no effect"):
        PretrainSettings.of(output_dir="somewhere", rope_theta=500.0)
