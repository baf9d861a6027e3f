"""The default corpus is prose without duplicates, in an order that depends on names alone."""

import ast
import json
import re
from pathlib import Path

import pytest

from bertfast.data import docstrings
from bertfast.data.corpus import read_documents
from bertfast.data.docstrings import docstring_documents, gather_docstrings, module_paragraphs
from bertfast.data.prose import prose_paragraphs

NUMPY_STYLE = """Return the sum of the array, see :func:`~numpy.sum` and `the manual <https://example.org>`_.

    More in [1]_ and in ``this`` *important* paragraph,
    which goes on.

    .. versionadded:: 1.2

    .. note:: Ignored

        The note of a directive is prose as well.

    .. code-block:: python

        the code of a directive is not = prose

    Parameters
    ----------
    a : array_like, optional
        Elements to sum. They are summed in the order of the axis.
    axis : int
        the_axis

    Returns
    -------
    sum_along_axis : ndarray
        An array with the same shape as the input.

    Examples
    --------
    >>> the_sum_of_the([0.5, 1.5])
    2.0 is the answer of the doctest

    The example shows how to use this, like so::

        this is a literal block of the text

    A | table | of | the | columns
    ==== ==== ====

    References
    ----------
    A. Nonymous, The book of the sums, in the year of the Lord.
"""
GOOGLE_STYLE = """Build the thing in one call.

Args:
    size (`int`, *optional*, defaults to `1`): The size of the thing,
        counted in units.
    name: str, optional
        The name of the thing.
    flag (bool): x = 1 if the flag is set

```python
this = the + code of the example
```

:param other: The other side of the thing.
:type other: int

- The first item of a list.
- The second item of [a list](https://example.org) of [`~two`] <b>things</b>.

See https://example.org for the rest.
Where the \\alpha of \\(x\\) is the rate of change.
"""


def test_numpy_style_docstrings_yield_their_sentences():
    assert prose_paragraphs(NUMPY_STYLE) == [
        "Return the sum of the array, see sum and the manual.",
        "More in and in this important paragraph, which goes on.",
        "The note of a directive is prose as well.",
        "Elements to sum. They are summed in the order of the axis.",
        "An array with the same shape as the input.",
    ]


def test_google_and_sphinx_style_docstrings_yield_their_sentences():
    assert prose_paragraphs(GOOGLE_STYLE) == [
        "Build the thing in one call.",
        "The size of the thing, counted in units.",
        "The name of the thing.",
        "The other side of the thing.",
        "The first item of a list.",
        "The second item of a list of two things.",
    ]


@pytest.mark.parametrize(
    "text",
    ["", "foo(a, b=1) -> the int", "x, y, z", "Parameters:", "1 2 3 4 5 of the 6 7 8", "NAME_OF_THE CONSTANT_IN_A C_D"],
)
def test_text_that_is_not_prose_yields_nothing(text):
    assert prose_paragraphs(text) == []


def test_docstrings_of_a_module_come_in_order_without_importing_it(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""The docstring of the module."""\n'
        "raise SystemExit\n"
        "if True:\n"
        "    class A:\n"
        '        """The docstring of the class."""\n'
        '        text = """The text of a string is not one."""\n'
        "        async def f(self):\n"
        '            """The docstring of the function."""\n'
        "try:\n    pass\nexcept E:\n    def g():\n"
        '        """The docstring of the handler."""\n'
    )
    assert module_paragraphs(path) == [
        f"The docstring of the {owner}." for owner in ("module", "class", "function", "handler")
    ]
    path.write_text('print """of another Python"""')
    assert module_paragraphs(path) == []


@pytest.fixture(scope="module")
def documents():
    """The documents of some modules of two installed packages and of the standard library."""
    with pytest.MonkeyPatch.context() as patch:
        chosen = ("numpy.lib.", "tqdm.", "asyncio.")
        modules = [module for module in docstrings._modules() if module[1].startswith(chosen)]
        patch.setattr(docstrings, "_modules", lambda: modules[::-1])
        return list(docstring_documents(processes=2))


def test_documents_are_sorted_and_name_their_package(documents):
    names = [(package, module) for package, module, _ in documents]
    assert names == sorted(set(names))
    assert {package for package, _ in names} == {"numpy", "tqdm", "python"}
    assert ("python", "asyncio.queues") in names
    assert not [module for _, module in names if ".tests." in module]


def test_paragraphs_are_unique_and_prose(documents):
    paragraphs = [paragraph for _, _, document in documents for paragraph in document]
    assert len(paragraphs) == len(set(paragraphs)) > 800
    assert not [p for p in paragraphs if re.search(r"\n|>>>|::|``|https?:|\\|  ", p)]
    assert sum(map(len, paragraphs)) > 80_000
    assert sum(p[0].isupper() for p in paragraphs) > 0.9 * len(paragraphs)
    assert sum(p[-1] in '.!?")' for p in paragraphs) > 0.7 * len(paragraphs)


def test_the_corpus_is_written_once_as_json_lines(tmp_path, monkeypatch):
    found = [("a", "a.b", ["One paragraph of it.", "Another é of it."]), ("c", "c", ["The last of it."])]
    monkeypatch.setattr(docstrings, "docstring_documents", lambda processes: iter(found))
    path = gather_docstrings(tmp_path / "docstrings.jsonl")
    assert list(read_documents(path)) == [paragraphs for _, _, paragraphs in found]
    assert [json.loads(line)["package"] for line in path.read_text(encoding="utf-8").splitlines()] == ["a", "c"]
    monkeypatch.setattr(docstrings, "docstring_documents", None)
    assert gather_docstrings(path) == path
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_installed_packages_and_the_standard_library_are_found():
    modules = {module: (package, path) for package, module, path in docstrings._modules()}
    assert modules["ast"] == ("python", Path(ast.__file__))
    assert modules["torch.nn.functional"][0] == "torch"
