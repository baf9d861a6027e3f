"""Nothing that a user names is run, unpacked without limits, or read as a pickle."""

import ast
from pathlib import Path

import pytest

from bertfast.cli.main import main

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("bertfast", "bench", "build_support") for path in sorted((ROOT / folder).rglob("*.py"))]


def unsafe_calls(source: str) -> list[str]:
    """Return the calls that can run programs in a file, or write outside of a folder."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            name = ast.unparse(node.func)
            if (
                (name == "torch.load" and keywords.get("weights_only") is not True)
                or (name.endswith("extractall") and keywords.get("filter") != "data")
                or name in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval")
                or keywords.get("allow_pickle") is True
                or keywords.get("trust_remote_code") is True
            ):
                found.append(name)
    return found


def test_no_program_reads_pickles_or_unpacks_outside_of_its_folder():
    assert SOURCES
    assert not {str(path): calls for path in SOURCES if (calls := unsafe_calls(path.read_text(encoding="utf-8")))}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(data)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "archive.extractall(folder)",
    ],
)
def test_planted_unsafe_calls_are_found(line):
    assert unsafe_calls(line)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
            "aliases",
        ),
        (
            "a0: &a0 {x: 1}\n"
            + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)),
            "aliases",
        ),
        ("x: " + "[" * 200_000, "too deeply nested"),
        ("# comment\n" * 200_000, "bytes; give `name: value` lines"),
        ("- a\n- b\n", "must hold `name: value` lines, got ['a', 'b']"),
        ("x: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
    ],
)
def test_a_yaml_file_that_would_fill_memory_or_run_a_program_is_refused(content, message, tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    assert main(["prepare", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
