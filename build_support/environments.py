"""Install a built package into empty environments, one per version of Python and PyTorch, and test it there.

    python build_support/environments.py dist/bertfast-0.1.0-cp311-abi3-manylinux_2_34_x86_64.whl --tests tests/ops

runs the smoke test, and the tests that are named, with the oldest supported PyTorch on this Python and the newest
on this and on every other supported Python that is installed. The environments are kept and used again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parents[1]
SMOKE_TEST = Path(__file__).with_name("smoke_test.py")
ENVIRONMENTS = ROOT / "build" / "environments"
PYTHONS = ("3.11", "3.12", "3.13")
TEST_PACKAGES = ("pytest>=9", "pytest-xdist>=3.6", "hypothesis")


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        interpreter: Python that creates it.
        name: Folder of the environment in `build/environments`.
        torch: Requirement of PyTorch, such as "torch==2.10.*".
    """

    interpreter: str
    name: str
    torch: str

    @property
    def python(self) -> Path:
        """The interpreter of the environment."""
        return ENVIRONMENTS / self.name / "bin" / "python"

    def create(self) -> None:
        """Create the environment with PyTorch, unless an earlier call did."""
        finished = ENVIRONMENTS / self.name / "ready"
        if not finished.exists():
            run(self.interpreter, "-m", "venv", "--clear", str(ENVIRONMENTS / self.name))
            self.install(self.torch)
            finished.touch()

    def install(self, *arguments: str) -> None:
        """Run `pip install` with these arguments."""
        run(str(self.python), "-m", "pip", "install", "--quiet", *arguments)

    def replace(self, package: Path, *options: str) -> None:
        """Install bertfast from a wheel or sdist, with its requirements, in place of an earlier one."""
        run(str(self.python), "-m", "pip", "uninstall", "--quiet", "--yes", "bertfast")
        self.install(*options, str(package))

    def smoke_test(self, *options: str) -> None:
        """Run the smoke test outside the checkout."""
        run(str(self.python), str(SMOKE_TEST), *options, cwd=ENVIRONMENTS)


def run(*command: str, cwd: Path = ROOT, variables: Mapping[str, str] = MappingProxyType({})) -> None:
    """Run a program with these variables added to the environment, and without the caller's PYTHONPATH.

    Raises:
        CalledProcessError: It failed.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=cwd, env={**inherited, "PYTHONSAFEPATH": "1", **variables}, check=True)


def oldest_torch() -> str:
    """Return the requirement of the oldest PyTorch that pyproject.toml allows."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (oldest,) = (item.removeprefix("torch>=") for item in dependencies if item.startswith("torch>="))
    return f"torch=={oldest}.*"


def find_pythons() -> dict[str, str]:
    """Return the path of an interpreter by supported version, of those that are installed."""
    found = {}
    for version in PYTHONS:
        installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        candidates = [f"python{version}", *map(str, installed)]
        if version == f"{sys.version_info.major}.{sys.version_info.minor}":
            candidates.insert(0, sys.executable)
        if working := next(filter(_works, candidates), None):
            found[version] = working
    return found


def _works(interpreter: str) -> bool:
    # A shim of pyenv exists for versions that the folder does not select, and fails.
    try:
        return subprocess.run([interpreter, "-c", "import venv"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def matrix() -> list[Environment]:
    """Return the environments to test: the oldest PyTorch once, the newest with every Python."""
    pythons = find_pythons()
    first = next(iter(pythons))
    return [
        Environment(pythons[first], f"python{first}-oldest", oldest_torch()),
        *(Environment(path, f"python{version}-newest", "torch") for version, path in pythons.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="Wheel to install.")
    parser.add_argument("--tests", nargs="*", default=[], help="Arguments of pytest, run after the smoke test.")
    arguments = parser.parse_args()
    for environment in matrix():
        print(f"{environment.name}:", flush=True)
        environment.create()
        environment.replace(arguments.package.resolve())
        environment.smoke_test("--native")
        if arguments.tests:
            environment.install(*TEST_PACKAGES)
            run(str(environment.python), "-m", "pytest", "-q", "-m", "not slow", *arguments.tests)


if __name__ == "__main__":
    main()
