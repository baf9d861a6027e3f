"""Data files with every kind of damage, YAML files, and what else a path may name."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from zipfile import ZipFile

from sentiment import FILLERS

SENTENCES = [f"the film was {word} and the plot was very {word}" for word in ("good", "bad", "good", "bad")] * 2
LABELS = ["good", "bad"] * 4
TAGS = {"good": "B-GOOD", "bad": "B-BAD"}


def _question(number: int, context: str, **changes: object) -> dict:
    word = context.split()[3]
    question = {
        "id": str(number),
        "question": "what was the film",
        "answers": [{"text": word, "answer_start": context.index(word)}],
    }
    return {name: value for name, value in (question | changes).items() if value != "absent"}


def _squad(**changes: object) -> str:
    paragraphs = [{"context": text, "qas": [_question(i, text, **changes)]} for i, text in enumerate(SENTENCES)]
    return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]})


def _table(separator: str, *, labels: list[str] = LABELS, names: tuple[str, ...] = ("sentence", "label")) -> str:
    rows = [separator.join(row) for row in zip(SENTENCES, labels, strict=True)]
    return "\n".join([separator.join(names), *rows]) + "\n"


def _json_lines(**changes: object) -> str:
    rows = ({"sentence": text, "label": label} | changes for text, label in zip(SENTENCES, LABELS, strict=True))
    return "".join(json.dumps(row) + "\n" for row in rows)


def _conll(separator: str = "\t", tag: str | None = None) -> str:
    sentences = ([f"{word}{separator}{tag or TAGS.get(word, 'O')}" for word in text.split()] for text in SENTENCES)
    return "\n\n".join("\n".join(lines) for lines in sentences) + "\n"


def _choices(label: str = "0") -> str:
    rows = [f'"{text}","it was good","it was bad",{label}' for text in SENTENCES]
    return "\n".join(["sent1,ending0,ending1,label", *rows]) + "\n"


GOOD = {  # by format: a file that a command reads, and its suffix
    "text": (".txt", "\n\n".join(f"{text}.\nIt was a film. Then it was over." for text in SENTENCES)),
    "tsv": (".tsv", _table("\t")),
    "csv": (".csv", _table(",")),
    "jsonl": (".jsonl", _json_lines()),
    "conll": (".conll", _conll()),
    "choices": (".csv", _choices()),
    "squad": (".json", _squad()),
}

OWN_FAULTS = {  # by format: faults that only this format can have
    "text": {
        "one_document": "One document. It has two sentences.\n",
        "one_word": "film\n",
        "special": "[MASK] [CLS]\n",
    },
    "tsv": {
        **{
            f"labels_{i}": _table("\t", labels=[label, "0"] * 4)
            for i, label in enumerate(("nan", "inf", "-1", "", "1.0"))
        },
        "spaces": _table("\t", labels=["good ", "good"] * 4),
        "numbers": _table("\t", labels=["1.5", "2"] * 4),
        "no_label": _table("\t", names=("sentence", "other")),
        "no_text": _table("\t", names=("other", "label")),
        "twice": _table("\t", names=("sentence", "sentence")),
        "unnamed": _table("\t", names=("", "")),
        "header": "sentence\tlabel\n",
        "one_row": "sentence\tlabel\nfilm\tgood\n",
        "ragged": "sentence\tlabel\nfilm\nfilm\tgood\tbad\n",
        "one_label": _table("\t", labels=["good"] * 8),
        "commas": _table(","),
        "pairs": "sentence1\tsentence2\tlabel\n\tfilm\tgood\nfilm\t\tbad\n",
    },
    "csv": {
        "open_quote": 'sentence,label\n"a film,good\nfilm,bad\nplot,good\n',
        "quote_within": 'sentence,label\na "film" b,good\n"film"x,bad\n',
        "tabs": _table("\t"),
        "semicolons": _table(";"),
    },
    "jsonl": {
        "null": _json_lines(sentence=None),
        "number": _json_lines(sentence=3),
        "list": _json_lines(label=["good", 3]),
        "object": _json_lines(label={}),
        "surrogate": _json_lines(sentence="\ud800"),
        "list_rows": "[1]\n[2]\n",
        "cut": _json_lines()[:-20],
        "deep": "[" * 100_000,
        "large": '{"sentence": "a", "label": 1' + "0" * 5000 + "}\n",
        "nan": '{"sentence": "a", "label": NaN}\n{"sentence": "b", "label": Infinity}\n',
        "other_keys": '{"sentence": "a", "label": 1}\n{"text": "a"}\n',
    },
    "conll": {
        "spaces": _conll(" "),
        "one_column": "\n".join(FILLERS),
        "underscore": _conll(tag="_"),
        "no_tag": _conll(tag=" "),
        "comments": "# id 1\nfilm\tO\n# x y domain=en\n\ngood\tB-GOOD\n",
        "columns": "film O\ngood x y B-GOOD\nbad\n",
        "orphans": "film I-BAD\ngood E-GOOD\n\nbad X-BAD\n",
        "docstart": "-DOCSTART- O\n\n",
    },
    "choices": {
        "minus_one": _choices("-1"),
        "too_high": _choices("7"),
        "words": _choices("good"),
        "one_ending": "sent1,ending0,label\na,b,0\n",
        "none": "sent1,label\na,0\n",
    },
    "squad": {
        **{f"no_{name}": _squad(**{name: "absent"}) for name in ("id", "question", "answers")},
        **{f"null_{name}": _squad(**{name: None}) for name in ("id", "question", "answers")},
        "same_ids": _squad(id="1"),
        "datasets": _squad(answers={"text": ["film"], "answer_start": [4]}),
        "wrong_start": _squad(answers=[{"text": "film", "answer_start": 999}]),
        "text_start": _squad(answers=[{"text": "film", "answer_start": "4"}]),
        "number": _squad(answers=3),
        "texts": _squad(answers=["film"]),
        "no_start": _squad(answers=[{"text": "film"}]),
        "impossible": _squad(answers=[], is_impossible=True),
        **{f"shape_{i}": x for i, x in enumerate(('{"data": 3}', '{"data": [3]}', '{"data": [{"paragraphs": [3]}]}'))},
        **{f"json_{i}": x for i, x in enumerate(("[]", "3", "null", '"a"', "{}", "[" * 100_000, '{"data": null}'))},
        "no_context": '{"data": [{"paragraphs": [{"qas": [{}]}]}]}',
        "empty_context": '{"data": [{"paragraphs": [{"context": "", "qas": [{"id": "1", "question": "a"}]}]}]}',
    },
}


def _zip(content: bytes) -> bytes:
    out = BytesIO()
    with ZipFile(out, "w") as archive:
        archive.writestr("a.txt", content)
    return out.getvalue()


FAULTS: dict[str, Callable[[bytes], bytes]] = {  # faults that a file of any format can have
    "good": lambda content: content,
    "bom": lambda content: b"\xef\xbb\xbf" + content,
    "crlf": lambda content: content.replace(b"\n", b"\r\n"),
    "cr": lambda content: content.replace(b"\n", b"\r"),
    "nul": lambda content: content[:40] + b"\0" + content[40:],
    "late_nul": lambda content: content * 40 + b"\0\n",
    "latin_1": lambda content: content.replace(b"film", b"\xe9t\xe9"),
    "utf_16": lambda content: content.decode().encode("utf-16"),
    "utf_16_le": lambda content: content.decode().encode("utf-16-le"),
    "surrogate_bytes": lambda content: content.replace(b"film", b"\xed\xa0\x80"),
    "surrogate_escape": lambda content: content.replace(b"film", b"\\ud800"),
    "lfs": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "gzip": gzip.compress,
    "gzip_cut": lambda content: gzip.compress(content)[:-12],
    "gzip_damaged": lambda content: gzip.compress(content)[:30] + b"\xff" * 30,
    "xz_cut": lambda content: lzma.compress(content)[:-20],
    "bz2_cut": lambda content: bz2.compress(content)[:-5],
    "zip": _zip,
    "empty": lambda content: b"",
    "spaces": lambda content: b" \t \n\n\r\n",
    "blank_lines": lambda content: content.replace(b"\n", b"\n\n\n"),
    "cut": lambda content: content[: len(content) // 2 + 3],
    "no_spaces": lambda content: content.replace(b" ", b""),
    "long_field": lambda content: content.replace(b"film", b"film " * 30_000, 1),
    "long_word": lambda content: content.replace(b"film", b"f" * 200_000, 1),
    "controls": lambda content: content.replace(b"film", b"\x01\x1b[31m\x7f"),
    "invisible": lambda content: content.replace(b"film", "\u200b\ufeff\u2028\u0085".encode()),
    "emoji": lambda content: content.replace(b"film", "\U0001f600\u0301e\u0301".encode()),
    "vertical_tab": lambda content: content.replace(b"film", b"fi\x0b\x0c\x1clm"),
    "random": lambda content: bytes((i * 7919 + i // 3) % 256 for i in range(3000)),
    "quotes": lambda content: content.replace(b"film", b'"film'),
    "twice": lambda content: content + content,
    "parquet": lambda content: b"PAR1" + content,
}

_JSON_TEXTS = {
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "other_keys": b'{"a": 1}',
    "deep": b"[" * 100_000,
}


def _nulls(content: bytes) -> bytes:
    """Replace all values of a JSON object by null."""
    try:
        return json.dumps(dict.fromkeys(json.loads(content))).encode()
    except (ValueError, TypeError):
        return content.replace(b"1", b"null")


FILE_FAULTS: dict[str, Callable[[bytes], bytes | None]] = {  # of files that programs write; None: the file is absent
    **{name: FAULTS[name] for name in ("bom", "nul", "lfs", "empty", "cut", "random", "spaces")},
    **{name: lambda content, text=text: text for name, text in _JSON_TEXTS.items()},
    "nulls": _nulls,
    "absent": lambda content: None,
}


def replace(path: Path, content: bytes | None) -> None:
    """Replace the content of a file; None: remove it."""
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


def write_files(folder: Path) -> dict[str, list[str]]:
    """Write the files of every format and fault; return their names by format.

    "path" are folders, links and other things that a path may name.
    """
    names: dict[str, list[str]] = {}
    for form, (suffix, text) in GOOD.items():
        contents = {fault: change(text.encode()) for fault, change in FAULTS.items()}
        contents |= {fault: own.encode("utf-8", "surrogatepass") for fault, own in OWN_FAULTS[form].items()}
        files = {f"{form}_{fault}{suffix}": content for fault, content in contents.items()}
        files[f"{form}.gz{suffix}"] = text.encode()
        files[f"{form}_plain{suffix}.gz"] = text.encode()
        files[f"{form}_no_suffix"] = files[f"{form}_of_another.parquet"] = text.encode()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        names[form] = sorted(files)
    names["path"] = sorted(_write_paths(folder))
    return names


def _write_paths(folder: Path) -> Iterator[str]:
    """Write folders, links and other things that a path may name; yield their names."""
    suffix, text = GOOD["text"]
    for name, files in {
        "folder": {"a.txt": text, "empty.txt": "", ".hidden.txt": text},
        "folder.tsv": {},
        "only_empty": {"a.txt": "", "b.txt": "\n"},
        "not_text": {"a.txt": text, "b.txt": "\0\1"},
        "other_types": {"a.md": text, "b.docx": text},
    }.items():
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file).write_text(content)
        yield name
    for name, target in {
        "dangling.txt": "none.txt",
        "loop.txt": "loop.txt",
        "link.txt": f"text_good{suffix}",
        "link_to_folder": "folder",
        "folder/loop": ".",
    }.items():
        os.symlink(target, folder / name)
        yield name
    yield from (
        "none.txt",
        "none.tsv",
        "/dev/null",
        ".",
        "",
        "n\0l",
        "x" * 300 + ".txt",
        "text_good.txt/a.txt",
        "\udc80.txt",
    )


YAML = {
    "good.yaml": "max-seq-length: 16\n",
    "list.yaml": "- a\n- b\n",
    "number.yaml": "3\n",
    "deep.yaml": "[" * 5000,
    "nested.yaml": "max-seq-length: {a: [1, 2]}\n",
    "null.yaml": "max-seq-length:\n",
    "date.yaml": "max-seq-length: 2020-01-01\n",
    "word.yaml": "max-seq-length: many\n",
    "unknown.yaml": "max-length: 16\n1: 2\n? [a]\n: b\n",
    "twice.yaml": "max-seq-length: 16\nmax-seq-length: 99999999999999999999\n",
    "cut.yaml": 'max-seq-length: "16\n',
    "tag.yaml": "max-seq-length: !!python/object/apply:os.getcwd []\n",
    "nul.yaml": "max-seq-length: \0\n",
    "laughs.yaml": "a: &a [x, x, x, x]\n"
    + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghi")),
    "config.yaml": "config: good.yaml\n",
    "empty.yaml": "",
}


def write_yaml(folder: Path) -> list[str]:
    """Write YAML files; return their names."""
    for name, text in YAML.items():
        (folder / name).write_text(text)
    return sorted(YAML)
