"""Hooks of mkdocs: pages from outside docs/, a page of reference per module, and links to files of the repository."""

import posixpath
import re
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

logger = get_plugin_logger(__name__)
ROOT = Path(__file__).parents[1]
COPIED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")


def public_modules() -> dict[str, str]:
    """Return the name of every module of the package, as it is installed, with its name in this tree."""
    modules = {}
    for folder, package in (("bertfast", "bertfast"), ("kernels", "bertfast.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts != ("__main__",):
                inner = [part for part in parts if part != "__init__"]
                modules[".".join([package, *inner])] = ".".join([folder, *inner])
    return dict(sorted(modules.items()))


def repository_url() -> str:
    """Return the repository's address, which pyproject.toml has."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"])


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the reference into the navigation: a section per package, with its modules."""
    sections: dict[str, list[str]] = {}
    for module in public_modules():
        sections.setdefault(".".join(module.split(".")[:2]), []).append(f"reference/{module}.md")
    assert config.nav is not None
    config.nav.insert(-1, {"Reference": [{package: pages} for package, pages in sections.items()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository's root and the reference."""
    for name, page in COPIED.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for module, source in public_modules().items():
        files.append(File.generated(config, f"reference/{module}.md", content=f"# {module}\n\n::: {source}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages of the site, or to the repository for files that are not on it."""
    source = {target: name for name, target in COPIED.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def resolve(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        uri = COPIED.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(uri) and (target in COPIED or target.startswith("docs/")):
            return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + (match[2] or "")
        if not (ROOT / target).exists():
            logger.warning("%s links to %s, which does not exist", source, match[1])
        return f"{repository_url()}/blob/main/{target}{match[2] or ''}"

    return LINK.sub(resolve, markdown)
