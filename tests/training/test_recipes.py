"""The recipes are valid configurations."""

from pathlib import Path

import pytest

from bertfast.cli.demo import DemoSettings, _pretraining
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


def test_the_demo_uses_the_settings_of_the_cpu_recipe():
    recipe = settings("cpu").flat()
    demo = _pretraining(DemoSettings(), Path("data"), Path("somewhere")).flat()
    own = ("data_dir", "logging_steps", "eval_steps", "eval_batches", "save_steps", "seed", "resume", "device")
    assert recipe | dict.fromkeys(own) == demo | dict.fromkeys(own)
