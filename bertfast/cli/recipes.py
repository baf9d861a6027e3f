"""The configurations that are installed with the package: `recipes/` in a checkout, `bertfast/recipes` in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """Return the folder of the installed recipes."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names that `--config` accepts in place of a path, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def find_config(name: str) -> Path:
    """Return the YAML file that `--config` names: an existing file, else the installed recipe of that name.

    Raises:
        FileNotFoundError: There is neither such a file nor such a recipe.
    """
    if (path := Path(name)).is_file():
        return path
    if name in recipe_names():
        return recipes_folder() / f"{name}.yaml"
    raise FileNotFoundError(
        f"--config {name}: no such file or recipe; give a YAML file or one of {', '.join(recipe_names())}"
    )
