"""Formats and precisions of embeddings on disk, against sentence-transformers and numpy."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from bertfast.cli.main import main
from bertfast.inference.embed import EmbedSettings, embed
from bertfast.inference.embedding_files import quantize_embeddings, require_space_for_ids

TEXTS = ["the film was good", "bad", "a very bad plot and a good actor", "the", "music with a plot"]
PRECISIONS = ["float32", "int8", "uint8", "binary", "ubinary"]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("\n".join(["sentence\tid", *(f"{text}\tß{i}" for i, text in enumerate(TEXTS))]))
    return path


def run(model: Path, file: Path, out: Path, **changes) -> Path:
    where = {"model_name_or_path": str(model), "output_dir": str(out), "input_file": str(file)}
    return embed(EmbedSettings.of(**where, device="cpu", **{"precision": "fp32", "texts_per_part": 3} | changes))


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of all safetensors parts."""
    parts = [load_file(path) for path in sorted(folder.glob("part-*.safetensors"))]
    return {name: np.concatenate([part[name] for part in parts]) for name in ("embeddings", "rows")}


def read(folder: Path, output_format: str) -> tuple[np.ndarray, list[int], list[str] | None]:
    """Return embeddings, rows and ids of all parts of a table's embeddings."""
    paths = sorted(folder.glob(f"part-*.{output_format}"))
    assert len(paths) == 2
    if output_format == "npy":
        embeddings, rows, ids = (
            np.concatenate([np.load(path.with_name(path.name.replace("part", name))) for path in paths])
            for name in ("part", "rows", "ids")
        )
        return embeddings, rows.tolist(), ids.tolist()
    if output_format == "parquet":
        from pyarrow import parquet

        tables = [parquet.read_table(path) for path in paths]
        embeddings = [np.stack(part["embeddings"].to_numpy()) for part in tables]
        rows, ids = ([x for part in tables for x in part[name].to_pylist()] for name in ("row", "id"))
        return np.concatenate(embeddings), rows, ids
    ids = []
    for path in paths:
        with safe_open(path, framework="np") as file:
            ids += json.loads(file.metadata()["ids"])
    found = arrays(folder)
    return found["embeddings"], found["rows"].tolist(), ids


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [24, 37])
def test_precisions_are_those_of_sentence_transformers(precision, size):
    util = pytest.importorskip("sentence_transformers.util")
    generator = np.random.default_rng(0)
    calibration = generator.standard_normal((300, size), np.float32)
    calibration[:, 3] = 0.5  # an element without a range
    embeddings = 1.5 * generator.standard_normal((200, size), np.float32)  # some are out of range
    embeddings[5] = 0  # zero is no positive bit
    ranges = np.stack([calibration.min(0), calibration.max(0)])
    expected = util.quantize_embeddings(embeddings, precision, calibration_embeddings=calibration)
    found = quantize_embeddings(embeddings, precision, ranges if precision.endswith("int8") else None)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("output_format", ["safetensors", "parquet", "npy"])
def test_every_format_has_the_same_rows_and_ids(output_format, precision, pretrained, table, tmp_path):
    if output_format == "parquet":
        pytest.importorskip("pyarrow.parquet")
    exact = arrays(run(pretrained, table, tmp_path / "exact"))["embeddings"]
    options = {"output_format": output_format, "output_precision": precision}
    folder = run(pretrained, table, tmp_path / "out", **options)
    embeddings, rows, ids = read(folder, output_format)
    assert rows == [1, 2, 3, 4, 5]
    assert ids == [f"ß{i}" for i in range(5)]
    ranges = None
    if precision.endswith("int8"):
        ranges = np.load(folder / "ranges.npy")
        assert np.array_equal(ranges, np.stack([exact[:3].min(0), exact[:3].max(0)]))  # those of the first part
    else:
        assert not (folder / "ranges.npy").exists()
    expected = quantize_embeddings(exact, precision, ranges)
    assert embeddings.dtype == expected.dtype
    assert np.array_equal(embeddings, expected)


def test_one_part_of_int8_is_what_encode_gives(pretrained, table, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    folder = run(pretrained, table, tmp_path / "out", output_precision="int8", texts_per_part=100)
    expected = st.SentenceTransformer(str(pretrained), device="cpu").encode(TEXTS, precision="int8")
    difference = arrays(folder)["embeddings"].astype(int) - expected
    assert abs(difference).max() <= 1  # where rounding of fp32 moves a value over the end of a step
    assert (difference == 0).mean() > 0.9


def test_later_texts_are_quantised_like_those_before(pretrained, table, tmp_path):
    first = run(pretrained, table, tmp_path / "first", output_precision="uint8", texts_per_part=100)
    query = tmp_path / "query.txt"
    query.write_text(TEXTS[2] + "\n")
    with pytest.raises(ValueError, match=r"one text has no ranges .* give those of other texts with --ranges-file"):
        run(pretrained, query, tmp_path / "second", output_precision="uint8")
    second = run(
        pretrained, query, tmp_path / "second", output_precision="uint8", ranges_file=str(first / "ranges.npy")
    )
    difference = arrays(second)["embeddings"][0].astype(int) - arrays(first)["embeddings"][2]
    assert abs(difference).max() <= 1  # in another batch, sums are rounded otherwise
    assert not (second / "ranges.npy").exists()


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_embeddings_of_tokens_have_precisions_and_formats_too(precision, pretrained, table, tmp_path):
    exact = run(pretrained, table, tmp_path / "exact", pooling="none")
    options = {"pooling": "none", "output_precision": precision, "output_format": "npy"}
    folder = run(pretrained, table, tmp_path / "out", **options)
    for number in (0, 1):
        part = load_file(exact / f"part-0000{number}.safetensors")
        assert np.array_equal(np.load(folder / f"cu_seqlens-0000{number}.npy"), part["cu_seqlens"])
        ranges = np.load(folder / "ranges.npy") if precision == "int8" else None
        expected = quantize_embeddings(part["embeddings"], precision, ranges)
        assert np.array_equal(np.load(folder / f"part-0000{number}.npy"), expected)


@pytest.mark.parametrize("damage", ["part", "rows", "ranges", "other precision"])
def test_an_interrupted_run_continues_with_the_same_ranges(damage, pretrained, table, tmp_path, caplog):
    options = {"output_precision": "int8", "output_format": "npy"}
    folder = run(pretrained, table, tmp_path / "out", **options)
    whole = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    assert {*whole} == {"ranges.npy", *(f"{x}-0000{i}.npy" for x in ("part", "rows", "ids") for i in (0, 1))}
    if damage == "other precision":
        with pytest.raises(ValueError, match=r"--output-precision was \"int8\" and is \"uint8\""):
            run(pretrained, table, folder, **options | {"output_precision": "uint8"})
        return
    path = folder / ("ranges.npy" if damage == "ranges" else f"{damage}-00001.npy")
    path.write_bytes(path.read_bytes()[:-1])
    (folder / "ids-00001.npy").unlink()
    if damage == "ranges":
        (folder / "part-00001.npy").unlink()
    run(pretrained, table, folder, **options)
    assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == whole
    assert caplog.text.count("computed again") == 1
    unfinished = folder / "part-00001.npy"
    unfinished.unlink()
    run(pretrained, table, folder, **options)
    assert unfinished.read_bytes() == whole[unfinished.name]


def test_all_files_of_other_formats_are_replaced(pretrained, table, tmp_path):
    run(pretrained, table, tmp_path / "out", output_precision="int8", output_format="npy")
    folder = run(pretrained, table, tmp_path / "out", overwrite_output_dir=True, texts_per_part=9)
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"part-00000.safetensors", "origin.json"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a", r"ranges\.npy is damaged or no \.npy file of numbers: give a ranges\.npy of bertfast embed$"),
        (np.array([{}]), r"ranges\.npy is damaged or no \.npy file of numbers: give a ranges\.npy of bertfast embed$"),
        (
            np.float32([[0] * 31 + [2], [1] * 32]),
            r"smallest value of element 31, 2, is above its largest, 1: the first",
        ),
        (np.zeros((2, 32)), r"must hold float32 of shape \[2, D\]"),
        (np.zeros((3, 32), np.float32), r"must hold float32 of shape \[2, D\]"),
        (np.full((2, 32), np.nan, np.float32), r"must hold float32 of shape \[2, D\]"),
        (np.zeros((2, 31), np.float32), r"ranges of 31 elements, and the embeddings have 32"),
        (None, r"--ranges-file .*ranges\.npy: no such file"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(content, message, pretrained, table, tmp_path, monkeypatch):
    path = tmp_path / "ranges.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    if content is None or "31 elements" not in message:  # else the size of embeddings must be known
        monkeypatch.setattr("bertfast.inference.embed.open_encoder", lambda *_: pytest.fail("opened the model"))
    monkeypatch.setattr("bertfast.inference.embed.compute_embeddings", lambda *_: pytest.fail("computed embeddings"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(pretrained, table, tmp_path / "out", output_precision="int8", ranges_file=str(path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranges_file": "a.npy"}, "--ranges-file would have no effect: only --output-precision int8 and uint8"),
        (
            {"output_precision": "uint8", "texts_per_part": 1},
            "--texts-per-part must be 2 or more for --output-precision uint8, .* or give .* with --ranges-file",
        ),
        ({"output_precision": "fp16"}, "--output-precision must be float32, int8, uint8, binary or ubinary"),
        ({"output_format": "csv"}, "--output-format must be safetensors, parquet or npy"),
    ],
)
def test_invalid_settings_raise(changes, message, pretrained, table, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(pretrained, table, tmp_path / "out", **changes)


def test_parquet_without_its_library_is_one_sentence(pretrained, table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bertfast.inference.embed.find_spec", lambda name: None)
    arguments = ["--model-name-or-path", str(pretrained), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["embed", *arguments, "--input-file", str(table), "--output-format", "parquet"]) == 1
    assert "--output-format parquet requires pyarrow: pip install 'bertfast[parquet]'" in capsys.readouterr().err


def test_a_table_with_more_ids_than_a_header_holds_is_refused(pretrained, table, tmp_path, monkeypatch):
    monkeypatch.setattr("bertfast.inference.embedding_files._LARGEST_HEADER", 20)
    with pytest.raises(ValueError, match=r"no space for so many ids: choose a smaller --texts-per-part"):
        run(pretrained, table, tmp_path / "out")
    assert len(read(run(pretrained, table, tmp_path / "npy", output_format="npy"), "npy")[2]) == 5


def test_a_long_id_that_numpy_would_give_all_ids_the_space_of_is_refused(pretrained, tmp_path):
    ids = ["a", "b" * 20_000_000, "c"]
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_text("\n".join(json.dumps({"sentence": "good", "id": row_id}) for row_id in [*ids[1:], *range(40)]))
    problem = (
        r"row 1 has an id of 20,000,000 characters, and in numpy's format 42 ids would take as many each, 3.4 GB: "
    )
    with pytest.raises(ValueError, match=problem + "choose --output-format parquet or safetensors, or shorter ids"):
        run(pretrained, file, out, output_format="npy", texts_per_part=100)
    assert not [*out.glob("*.npy")]
    require_space_for_ids(out / "part-0.npy", [1, 2, 3], ids)  # most of which is no padding
    require_space_for_ids(out / "part-0.npy", [*range(9_000)], ["a" * 1000] * 9_000)
    require_space_for_ids(out / "part-0.parquet", [*range(43)], ids[1:] + ["d"] * 40)


def test_lines_have_no_ids(pretrained, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n".join(TEXTS))
    with safe_open(run(pretrained, file, tmp_path / "a") / "part-00000.safetensors", framework="np") as part:
        assert part.metadata() == {"format": "pt"}
    assert not list(run(pretrained, file, tmp_path / "b", output_format="npy").glob("ids*"))
