"""A result file is measured, not edited: git's history has no other values under the same origin."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from bench.result_files import ROOT

RESULTS = sorted((ROOT / "bench" / "results").rglob("*.json"))


def git(*arguments: str) -> str | None:
    """Return what git prints, None if it fails, for example because this is no repository."""
    ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return ran.stdout if ran.returncode == 0 else None


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield all numbers of a JSON value with their paths, and the lengths of its lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{path}/{key}")
    elif isinstance(value, list):
        yield f"{path}/length", len(value)
        for index, item in enumerate(value):
            yield from numbers(item, f"{path}/{index}")
    elif isinstance(value, int | float):
        yield path, value


def edited(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the numbers that two versions of a result file with the same origin do not share.

    Only paths of both are compared, so that a key may be renamed.
    """
    if old.get("origin") != new.get("origin"):
        return []
    before, now = dict(numbers(old)), dict(numbers(new))
    return [f"{path}: {before[path]} -> {now[path]}" for path in before if now.get(path, before[path]) != before[path]]


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: str(file.relative_to(ROOT / "bench" / "results")))
def test_values_of_a_result_file_change_only_with_its_origin(file):
    name = file.relative_to(ROOT).as_posix()
    commits = git("log", "--format=%H", "--", name)
    if commits is None:
        pytest.skip("there is no git history")
    new = json.loads(file.read_text(encoding="utf-8"))
    for commit in commits.split():
        if old := git("show", f"{commit}:{name}"):
            assert edited(json.loads(old), new) == [], f"{name} was edited since {commit[:9]}: measure it again"


def test_an_edited_value_is_found_and_a_renamed_key_is_not():
    old = {"origin": {"commit": "a"}, "seconds": 542.6, "step": 3, "runs": [{"who": "one", "seconds": [1.0, 2.0]}]}
    assert edited(old, old | {"seconds": 579}) == ["/seconds: 542.6 -> 579"]
    assert edited(old, old | {"runs": [{"who": "one", "seconds": [1.0]}]}) == ["/runs/0/seconds/length: 2 -> 1"]
    assert edited(old, old | {"seconds": 579, "origin": {"commit": "b"}}) == []
    renamed = {key: value for key, value in old.items() if key != "step"} | {"steps": 3}
    assert edited(old, renamed | {"runs": [{"implementation": "bertfast", "seconds": [1.0, 2.0]}]}) == []
