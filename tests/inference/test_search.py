"""Exact search in the vectors that `bertfast embed` writes, against brute force and sentence-transformers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bertfast.cli.main import main
from bertfast.inference import embed as embed_module
from bertfast.inference import search as search_module
from bertfast.inference.embed import EmbedSettings, embed
from bertfast.inference.embedding_files import dequantize_embeddings, quantize_embeddings
from bertfast.inference.search import search_vectors
from bertfast.inference.vector_folder import VectorFolder
from bertfast.runtime.signals import RunStopped

TEXTS = ["the film was good", "bad", "a very bad plot and a good actor", "the", "music with a plot", "a film", "actor"]
QUERIES = ["a good film", "bad music"]
PRECISIONS = ["float32", "int8", "uint8", "binary", "ubinary"]


def run(model: Path, out: Path, **changes) -> Path:
    """Embed `TEXTS`, which have the ids d1, d2 and so on, and return the folder."""
    file = out.with_suffix(".tsv")
    file.write_text("\n".join(["text\tid", *(f"{text}\td{i}" for i, text in enumerate(TEXTS, 1))]) + "\n")
    where = {"model_name_or_path": str(model), "output_dir": str(out), "input_file": str(file)}
    return embed(EmbedSettings.of(**where, device="cpu", **{"precision": "fp32", "texts_per_part": 3} | changes))


def vectors_of(model: Path, out: Path) -> np.ndarray:
    """Return the fp32 embeddings of `TEXTS`."""
    parts = sorted(run(model, out).glob("part-*"))
    return np.concatenate([load_file(part)["embeddings"].numpy() for part in parts])


def searched(model: Path, folder: Path, queries: list[str], capsys, *flags: str) -> list[dict]:
    """Return what the command prints for queries."""
    file = folder.with_name("queries.txt")
    file.write_text("\n".join(queries) + "\n")
    arguments = ["--embeddings-dir", str(folder), "--model-name-or-path", str(model), "--input-file", str(file)]
    capsys.readouterr()
    assert main(["search", *arguments, "--device", "cpu", "--precision", "fp32", *flags]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def small_chunks(monkeypatch):
    """Compare two vectors with two queries at a time."""
    monkeypatch.setattr(search_module, "_CHUNK", 64)
    monkeypatch.setattr(search_module, "_QUERIES", 2)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("output_format", ["safetensors", "parquet", "npy"])
def test_every_format_and_precision_is_searched_exactly(output_format, precision, similarity, pretrained, tmp_path):
    if output_format == "parquet":
        pytest.importorskip("pyarrow.parquet")
    exact = vectors_of(pretrained, tmp_path / "exact")
    folder = run(pretrained, tmp_path / "out", output_format=output_format, output_precision=precision)
    ranges = np.load(folder / "ranges.npy") if precision.endswith("int8") else None
    stored = dequantize_embeddings(quantize_embeddings(exact, precision, ranges), precision, ranges, 32)
    queries = np.random.default_rng(0).standard_normal((5, 32), np.float32)
    expected = queries.astype(np.float64) @ stored.T.astype(np.float64)
    if similarity == "cosine":
        expected /= np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(stored, axis=1)
    for hits, scores in zip(search_vectors(folder, queries, 4, similarity), expected, strict=True):
        best = np.argsort(-scores)[:4]
        assert [hit.row for hit in hits] == [*(best + 1)]
        assert [hit.id for hit in hits] == [f"d{row + 1}" for row in best]
        np.testing.assert_allclose([hit.score for hit in hits], scores[best], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_quantised_vectors_stand_for_the_middle_of_their_steps(precision):
    embeddings = np.random.default_rng(0).standard_normal((300, 24), np.float32)
    embeddings[:, 3] = 0.5  # an element without a range
    ranges = np.stack([embeddings.min(0), embeddings.max(0)])
    found = dequantize_embeddings(quantize_embeddings(embeddings, precision, ranges), precision, ranges, 24)
    steps = (ranges[1] - ranges[0]) / 255
    assert (abs(found - embeddings) <= steps * 0.5001 + 1e-6)[embeddings < ranges[1]].all()
    assert (found[:, 3] == 0.5).all()


@pytest.mark.parametrize("size", [24, 37])
def test_bits_stand_for_signs(size):
    embeddings = np.random.default_rng(0).standard_normal((9, size), np.float32)
    for precision in ("binary", "ubinary"):
        found = dequantize_embeddings(quantize_embeddings(embeddings, precision, None), precision, None, size)
        assert np.array_equal(found, np.sign(embeddings))


def test_the_command_prints_what_sentence_transformers_finds(pretrained, tmp_path, capsys):
    st = pytest.importorskip("sentence_transformers")
    model = st.SentenceTransformer(str(pretrained), device="cpu")
    folder = run(pretrained, tmp_path / "out")
    queries = [*QUERIES, ""]  # a blank one has an embedding, too
    for name, function in (("cosine", st.util.cos_sim), ("dot", st.util.dot_score)):
        expected = st.util.semantic_search(model.encode(queries), model.encode(TEXTS), top_k=3, score_function=function)
        found = searched(pretrained, folder, queries, capsys, "--top-k", "3", "--similarity", name)
        assert [line["row"] for line in found] == [1, 2, 3]
        for line, hits in zip(found, expected, strict=True):
            assert [hit["row"] - 1 for hit in line["hits"]] == [hit["corpus_id"] for hit in hits]
            assert [hit["id"] for hit in line["hits"]] == [f"d{hit['corpus_id'] + 1}" for hit in hits]
            scores = [hit["score"] for hit in hits]
            np.testing.assert_allclose([hit["score"] for hit in line["hits"]], scores, rtol=1e-4)


def test_queries_have_ids_and_come_from_standard_input_too(pretrained, tmp_path, pipe, capsys):
    folder = run(pretrained, tmp_path / "out")
    table = tmp_path / "queries.jsonl"
    table.write_text('{"id": "q7", "text": "a good film"}\n')
    arguments = ["--embeddings-dir", str(folder), "--model-name-or-path", str(pretrained), "--device", "cpu"]
    capsys.readouterr()
    assert main(["search", *arguments, "--input-file", str(table), "--top-k", "99"]) == 0
    from_table = json.loads(capsys.readouterr().out)
    assert (from_table["row"], from_table["id"], len(from_table["hits"])) == (1, "q7", len(TEXTS))
    pipe("a good film\n")
    assert main(["search", *arguments, "--top-k", "99"]) == 0
    piped = json.loads(capsys.readouterr().out)
    assert piped == {name: value for name, value in from_table.items() if name != "id"}


def test_the_texts_that_are_found_are_printed_on_request(pretrained, tmp_path, pipe, capsys):
    folder = run(pretrained, tmp_path / "out")
    for line in searched(pretrained, folder, QUERIES, capsys, "--print-texts", "--top-k", "4"):
        assert [hit["text"] for hit in line["hits"]] == [TEXTS[hit["row"] - 1] for hit in line["hits"]]
    table = tmp_path / "out.tsv"
    arguments = ["search", "--embeddings-dir", str(folder), "--model-name-or-path", str(pretrained), "--print-texts"]
    table.write_text(table.read_text().replace("film", "plot"))
    assert main(arguments) == 1
    assert "--print-texts: --input-file was " in capsys.readouterr().err
    table.unlink()
    assert main(arguments) == 1
    assert f"--print-texts: the file of the texts, {table}: no such file" in capsys.readouterr().err
    pipe("a film\n")
    where = {"model_name_or_path": str(pretrained), "output_dir": str(tmp_path / "piped"), "device": "cpu"}
    arguments[2] = str(embed(EmbedSettings.of(**where)))
    assert main(arguments) == 1
    assert "has the vectors of standard input, of which no text is kept" in capsys.readouterr().err


def test_pairs_of_texts_are_printed_from_the_columns_that_were_embedded(pretrained, tmp_path, capsys):
    table = tmp_path / "a.jsonl"
    table.write_text('{"one": "good", "two": "a film"}\n{"one": "bad", "two": "music"}\n')
    columns = {"text_column": "one", "text_pair_column": "two"}
    where = {"model_name_or_path": str(pretrained), "output_dir": str(tmp_path / "out"), "input_file": str(table)}
    folder = embed(EmbedSettings.of(**where, **columns, device="cpu", precision="fp32"))
    (line,) = searched(pretrained, folder, ["good"], capsys, "--print-texts")
    assert sorted(hit["text"] for hit in line["hits"]) == [["bad", "music"], ["good", "a film"]]


@pytest.mark.parametrize("changes", [{"pooling": "cls"}, {"normalization": "l2"}, {"layers": "embeddings"}])
def test_queries_are_embedded_like_the_vectors(changes, pretrained, tmp_path, capsys):
    folder = run(pretrained, tmp_path / "out", **changes)
    for line, row in zip(searched(pretrained, folder, TEXTS, capsys, "--top-k", "1"), range(1, 8), strict=True):
        assert line["hits"][0]["row"] == row
        assert abs(line["hits"][0]["score"] - 1) < 1e-5


def test_queries_have_the_prompt_for_queries_unless_another_is_named(pretrained, tmp_path, capsys):
    model = shutil.copytree(pretrained, tmp_path / "model")
    entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    entries += [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (model / "modules.json").write_text(json.dumps(entries))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32, "pooling_mode": "mean"}')
    prompts = {"prompts": {"query": "a film ", "other": "bad "}, "similarity_fn_name": "dot"}
    (model / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    folder = run(model, tmp_path / "out")
    by_prompt = searched(model, folder, ["good"], capsys)
    assert by_prompt == searched(model, folder, ["a film good"], capsys, "--prompt-name", "none")
    assert by_prompt == searched(model, folder, ["good"], capsys, "--similarity", "dot")
    assert by_prompt != searched(model, folder, ["good"], capsys, "--similarity", "cosine")
    assert by_prompt != searched(model, folder, ["good"], capsys, "--prompt-name", "other")
    (model / "config_sentence_transformers.json").write_text(json.dumps(prompts | {"similarity_fn_name": "manhattan"}))
    folder = run(model, tmp_path / "again")
    assert main(["search", "--embeddings-dir", str(folder), "--model-name-or-path", str(model)]) == 1
    assert "similarity_fn_name 'manhattan', which is not supported: choose --similarity" in capsys.readouterr().err


@pytest.mark.usefixtures("small_chunks")
def test_of_equal_vectors_the_first_row_comes_first(pretrained, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("good\nbad\ngood\ngood\nbad\n")
    where = {"model_name_or_path": str(pretrained), "output_dir": str(tmp_path / "out"), "input_file": str(file)}
    folder = embed(EmbedSettings.of(**where, device="cpu", precision="fp32", eval_tokens=1))  # one text per batch
    query = load_file(folder / "part-00000.safetensors")["embeddings"][:1].numpy()
    (hits,) = search_vectors(folder, query, 5)
    assert [hit.row for hit in hits] == [1, 3, 4, 2, 5]
    assert {hit.id for hit in hits} == {None}


@pytest.mark.parametrize("output_format", ["safetensors", "parquet", "npy"])
def test_a_large_part_is_read_in_chunks(output_format, pretrained, tmp_path):
    if output_format == "parquet":
        pytest.importorskip("pyarrow.parquet")
    folder = VectorFolder.open(run(pretrained, tmp_path / "out", output_format=output_format, texts_per_part=100))
    assert [len(chunk) for chunk in folder.chunks(3, 32)] == [3, 3, 1]


def test_vectors_of_another_model_are_refused(pretrained, tmp_path, capsys):
    folder = run(pretrained, tmp_path / "out")
    other = shutil.copytree(pretrained, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert main(["search", "--embeddings-dir", str(folder), "--model-name-or-path", str(other)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{folder} has vectors of another model than {other}: --model-name-or-path was " in error
    assert error.endswith("; give the model that computed them, or embed the texts again")


@pytest.mark.parametrize(
    ("precision", "size", "found"), [("float32", 31, "32"), ("int8", 33, "32"), ("binary", 33, "from 25 to 32")]
)
def test_queries_with_another_width_are_refused(precision, size, found, pretrained, tmp_path):
    folder = run(pretrained, tmp_path / "out", output_precision=precision)
    with pytest.raises(ValueError, match=f"has vectors of {found} elements, and the queries are of {size}"):
        search_vectors(folder, np.ones((1, size), np.float32))


@pytest.mark.parametrize("output_format", ["safetensors", "parquet", "npy"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut off", r"part-00001\.\w+ is damaged .*run bertfast embed again"),
        ("missing", r"has part-00002\.\w+ but no part-00001\.\w+: run bertfast embed again"),
        ("other rows", r"part-00001\.\w+ does not have the rows from 4 on: run bertfast embed again"),
        ("no record", r"has no origin\.json that can be read: give the --output-dir of bertfast embed"),
        ("empty", r"has no part-00000\.\w+: embed texts first"),
        ("other command", r"belongs to `bertfast prepare`: give the --output-dir of bertfast embed"),
    ],
)
def test_damaged_folders_are_refused(damage, message, output_format, pretrained, tmp_path):
    if output_format == "parquet":
        pytest.importorskip("pyarrow.parquet")
    folder = run(pretrained, tmp_path / "out", output_format=output_format)
    part, record = folder / f"part-00001.{output_format}", folder / "origin.json"
    if damage == "cut off":
        part.write_bytes(part.read_bytes()[:-20])
    elif damage == "missing":
        part.unlink()
    elif damage == "other rows":
        for name in ("part", "rows"):
            if (file := folder / f"{name}-00000.{output_format}").exists():
                shutil.copyfile(file, folder / f"{name}-00001.{output_format}")
    elif damage == "no record":
        record.unlink()
    elif damage == "empty":
        for path in folder.glob("part-*"):
            path.unlink()
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | {"command": "prepare"}))
    with pytest.raises(ValueError, match=message):
        search_vectors(folder, np.ones((1, 32), np.float32))


def test_a_vector_per_token_and_values_that_are_not_finite_are_refused(pretrained, tmp_path):
    folder = run(pretrained, tmp_path / "tokens", pooling="none")
    with pytest.raises(ValueError, match=r"has a vector per token \(--pooling none\)"):
        search_vectors(folder, np.ones((1, 32), np.float32))
    folder = run(pretrained, tmp_path / "out", output_format="npy")
    values = np.load(folder / "part-00001.npy")
    values[1, 7] = np.nan
    np.save(folder / "part-00001.npy", values)
    with pytest.raises(ValueError, match=r"vectors are not finite in rows 4 to 6"):
        search_vectors(folder, np.ones((1, 32), np.float32))
    with pytest.raises(ValueError, match=r"queries must be finite"):
        search_vectors(folder, np.full((1, 32), np.nan, np.float32))
    with pytest.raises(ValueError, match="similarity must be cosine or dot"):
        search_vectors(folder, np.ones((1, 32), np.float32), similarity="euclidean")
    with pytest.raises(FileNotFoundError, match="no such folder; give the --output-dir of bertfast embed"):
        search_vectors(tmp_path / "nothing", np.ones((1, 32), np.float32))


@pytest.mark.parametrize(
    ("queries", "changes", "message"),
    [
        (["a film"], {}, r"queries must be finite and of shape \[Q, D\], got \['a film'\]: give embeddings, as Te"),
        ([[1.0], [1.0, 2.0]], {}, r"queries must be finite and of shape \[Q, D\], got \[\[1\.0\], \[1\.0, 2\.0\]\]"),
        ([], {}, r"queries must be finite and of shape \[Q, D\], got shape \[0\]"),
        (np.ones(32), {}, r"queries must be finite and of shape \[Q, D\], got shape \[32\]"),
        (np.ones((1, 32)), {"top_k": -3}, "--top-k must be at least 1, got -3"),
        (np.ones((1, 32)), {"top_k": 2.5}, "--top-k must be an integer, got 2.5"),
    ],
)
def test_arguments_that_are_no_embeddings_are_refused(queries, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        search_vectors(tmp_path, queries, **changes)


def test_queries_may_be_lists_of_numbers(pretrained, tmp_path):
    folder, queries = run(pretrained, tmp_path / "out"), np.eye(2, 32)
    assert search_vectors(folder, queries.tolist(), 2) == search_vectors(folder, queries, 2)


@pytest.mark.parametrize("piped", [False, True])
def test_vectors_of_an_embed_that_was_interrupted_are_refused(piped, pretrained, tmp_path, pipe, monkeypatch):
    write_part, written = embed_module.write_part, []

    def interrupted(path, part):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write_part(path, part)

    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    where = {"model_name_or_path": pretrained, "output_dir": tmp_path / "out", "texts_per_part": 2, "device": "cpu"}
    where |= {} if piped else {"input_file": tmp_path / "a.txt"}
    settings = EmbedSettings.of(**where)
    monkeypatch.setattr(embed_module, "write_part", interrupted)
    pipe("\n".join(TEXTS))
    with pytest.raises(RunStopped if piped else KeyboardInterrupt):
        embed(settings)
    assert written
    remedy = "type the same `bertfast embed` command once more" + ", with all texts again and --over" * piped
    with pytest.raises(ValueError, match=f"out is not complete: `bertfast embed` was interrupted.*{remedy}"):
        search_vectors(tmp_path / "out", np.ones((1, 32)))
    monkeypatch.setattr(embed_module, "write_part", write_part)
    pipe("\n".join(TEXTS))
    embed(settings.replace(overwrite_output_dir=piped))  # what the message says
    (hits,) = search_vectors(tmp_path / "out", np.ones((1, 32)))
    assert sorted(hit.row for hit in hits) == [*range(1, 1 + len(TEXTS))]


def test_a_folder_whose_last_part_is_gone_is_refused_and_completed(pretrained, tmp_path):
    folder = run(pretrained, tmp_path / "out")
    (folder / "part-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="has 6 of 7 vectors: run bertfast embed again, which writes the others"):
        search_vectors(folder, np.ones((1, 32)))
    assert len(VectorFolder.open(run(pretrained, folder))) == len(TEXTS)


@pytest.mark.parametrize("name", ["queries.txt", "queries.jsonl", None])
def test_a_search_without_queries_is_refused(name, pretrained, tmp_path, pipe, capsys):
    folder = run(pretrained, tmp_path / "out")
    pipe("")
    arguments = ["--embeddings-dir", str(folder), "--model-name-or-path", str(pretrained), "--device", "cpu"]
    if name is not None:
        (tmp_path / name).touch()
        arguments += ["--input-file", str(tmp_path / name)]
    assert main(["search", *arguments]) == 1
    message = f"--input-file {tmp_path / str(name)} is empty: it needs one text per line or row"
    message = {None: "standard input is empty", "queries.jsonl": f"{tmp_path}/queries.jsonl holds no rows"}.get(
        name, message
    )
    assert f"bertfast search: {message}" in capsys.readouterr().err
