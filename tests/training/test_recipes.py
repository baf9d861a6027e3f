"""The recipes: each is a configuration that the program takes."""

from dataclasses import asdict
from pathlib import Path

import pytest

from bertfast.cli.demo import DemoSettings, _pretraining
from bertfast.cli.main import parse
from bertfast.training.pretrain_settings import PretrainSettings, check_settings

RECIPES = {path.stem: path for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml")}


def settings(name: str) -> PretrainSettings:
    return parse("pretrain", PretrainSettings, ["--config", str(RECIPES[name]), "--output-dir", "somewhere"])


@pytest.mark.parametrize("name", RECIPES)
def test_the_program_takes_it(name):
    check_settings(settings(name))


def test_there_are_four():
    assert set(RECIPES) == {"paper", "fast", "cpu", "speedrun"}


def test_the_demo_is_the_recipe_for_a_cpu():
    recipe = asdict(settings("cpu"))
    demo = asdict(_pretraining(DemoSettings(), Path("data"), Path("somewhere")))
    own = ("data_dir", "logging_steps", "eval_steps", "eval_batches", "save_steps", "seed", "resume", "device")
    assert {name: value for name, value in recipe.items() if name not in own} == {
        name: value for name, value in demo.items() if name not in own
    }
