"""Embeddings of texts: transformers' hidden states, written in parts."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from bertfast.cli.main import main
from bertfast.data.tokenizer import load_tokenizer
from bertfast.inference.embed import EmbedSettings, embed
from bertfast.models.extensions import LAYERS, select_layers

TEXTS = ["the film was good", "bad", "a very bad plot and a good actor", "the", "music with a plot"]


def settings_for(model, folder, **changes) -> EmbedSettings:
    return EmbedSettings.of(
        model_name_or_path=str(model), output_dir=str(folder), device="cpu", precision="fp32", **changes
    )


def hf_hidden_states(folder) -> list[list[torch.Tensor]]:
    """Return the embeddings and every layer's output [tokens, H] of each text, computed by transformers."""
    model, tokenizer = transformers.BertModel.from_pretrained(folder).eval(), load_tokenizer(folder)
    with torch.no_grad():
        texts = [torch.tensor([tokenizer.encode(text).ids]) for text in TEXTS]
        return [[state[0] for state in model(ids, output_hidden_states=True).hidden_states] for ids in texts]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "none"])
def test_embeddings_are_transformers_hidden_states(layers, pooling, pretrained, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    changes = {"layers": layers, "pooling": pooling, "eval_tokens": 12, "texts_per_part": 2}
    folder = embed(settings_for(pretrained, tmp_path / "out", input_file=str(tmp_path / "texts.txt"), **changes))
    parts = sorted(folder.glob("part-*"))
    assert torch.cat([load_file(part)["rows"] for part in parts]).tolist() == [1, 2, 3, 4, 5]
    assert [part.name for part in parts] == [f"part-0000{i}.safetensors" for i in range(3)]
    found = [load_file(part) for part in parts]
    rows = torch.cat([part["embeddings"] for part in found])
    expected = []
    for states in hf_hidden_states(pretrained):
        indices, concatenated = select_layers(layers, transformers.BertConfig.from_pretrained(pretrained))
        chosen = [states[index] for index in indices]
        state = torch.cat(chosen, 1) if concatenated else torch.stack(chosen).mean(0)
        expected.append({"mean": state.mean(0, keepdim=True), "cls": state[:1], "none": state}[pooling])
    torch.testing.assert_close(rows, torch.cat(expected), atol=1e-5, rtol=1e-4)
    if pooling == "none":
        lengths = np.concatenate([part["cu_seqlens"].diff() for part in found])
        assert lengths.tolist() == [len(state) for state in expected]


def test_parquet_from_a_table_equals_safetensors_from_standard_input(pretrained, tmp_path, pipe):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "a.tsv"
    table.write_text("\n".join(["sentence\tid", *(f"{text}\ta{i}" for i, text in enumerate(TEXTS))]))
    folder = embed(settings_for(pretrained, tmp_path / "one", input_file=str(table), output_format="parquet"))
    columns = parquet.read_table(folder / "part-00000.parquet")
    assert (columns.column_names, columns["row"].to_pylist()) == (["row", "id", "embeddings"], [1, 2, 3, 4, 5])
    assert columns["id"].to_pylist() == ["a0", "a1", "a2", "a3", "a4"]
    rows = columns["embeddings"].to_pylist()
    pipe("\n".join(TEXTS))
    other = embed(settings_for(pretrained, tmp_path / "two"))
    torch.testing.assert_close(torch.tensor(rows), load_file(other / "part-00000.safetensors")["embeddings"])


@pytest.mark.parametrize("output_format", ["safetensors", "parquet"])
@pytest.mark.parametrize("damage", ["cut off", "empty", "other rows"])
def test_a_damaged_part_is_computed_again(damage, output_format, pretrained, tmp_path, caplog):
    if output_format == "parquet":
        pytest.importorskip("pyarrow.parquet")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    options = {"texts_per_part": 2, "output_format": output_format, "input_file": str(tmp_path / "texts.txt")}
    settings = settings_for(pretrained, tmp_path / "out", **options)
    first, second, _ = sorted(embed(settings).glob("part-*"))
    whole = second.read_bytes()
    second.write_bytes({"cut off": whole[:-1], "empty": b"", "other rows": first.read_bytes()}[damage])
    kept = first.stat().st_mtime_ns
    embed(settings)
    assert second.read_bytes() == whole
    assert first.stat().st_mtime_ns == kept
    assert caplog.text.count("computed again") == 1
    assert str(second) in caplog.text


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_blank_lines_have_vectors_too(source, pretrained, tmp_path, pipe):
    content = "\ufeffgood\r\n\r\n  \r\nbad\r\n\r\n"
    (tmp_path / "texts.txt").write_bytes(content.encode())
    pipe(content)
    input_file = str(tmp_path / "texts.txt") if source == "file" else None
    part = load_file(
        embed(settings_for(pretrained, tmp_path / "out", input_file=input_file)) / "part-00000.safetensors"
    )
    assert part["rows"].tolist() == [1, 2, 3, 4, 5]
    vectors = part["embeddings"]
    assert torch.equal(vectors[1], vectors[2])
    assert torch.equal(vectors[1], vectors[4])
    assert len({tuple(vector.tolist()) for vector in vectors}) == 3


def test_tables_are_read_in_chunks_with_their_row_numbers(pretrained, tmp_path):
    table = tmp_path / "a.csv"
    table.write_text("sentence\n" + "\n".join(["good", '""', "bad", "good", "the"]) + "\n")
    settings = settings_for(pretrained, tmp_path / "out", input_file=str(table), texts_per_part=2)
    parts = [load_file(part) for part in sorted(embed(settings).glob("part-*"))]
    assert [part["rows"].tolist() for part in parts] == [[1, 2], [3, 4], [5]]
    assert torch.equal(parts[0]["embeddings"][0], parts[1]["embeddings"][1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", r"--input-file .*a\.txt is empty: it needs one text per line"),
        (None, "standard input is empty"),
        ("a.md", r"--input-file .*a\.md: give text as \.txt, or a table as \.tsv, \.csv, \.jsonl or \.json"),
    ],
)
def test_input_without_texts_is_refused(name, message, pretrained, tmp_path, pipe):
    pipe("")
    input_file = name and str(tmp_path / name)
    if input_file:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        embed(settings_for(pretrained, tmp_path / "out", input_file=input_file))
    assert not list(tmp_path.glob("out/part-*"))


def test_texts_are_counted_without_a_progress_bar(pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr("bertfast.inference.embed.tqdm", partial(tqdm, disable=True))  # as TQDM_DISABLE=1 does
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    folder = embed(settings_for(pretrained, tmp_path / "out", input_file=str(tmp_path / "texts.txt")))
    assert len(load_file(folder / "part-00000.safetensors")["rows"]) == len(TEXTS)


def test_existing_parts_are_not_recomputed(pretrained, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    settings = settings_for(pretrained, tmp_path / "out", input_file=str(tmp_path / "texts.txt"), texts_per_part=2)
    folder = embed(settings)
    (folder / "part-00001.safetensors").unlink()
    before = (folder / "part-00000.safetensors").stat().st_mtime_ns
    embed(settings)
    assert (folder / "part-00000.safetensors").stat().st_mtime_ns == before
    assert (folder / "part-00001.safetensors").exists()


@pytest.mark.usefixtures("any_precision_runs")
@pytest.mark.parametrize("changed", ["text", "model", "pooling", "precision"])
def test_parts_of_another_text_model_or_setting_are_refused(changed, pretrained, tmp_path):
    text, model = tmp_path / "texts.txt", shutil.copytree(pretrained, tmp_path / "model")
    text.write_text("\n".join(TEXTS))
    folder = embed(settings_for(model, tmp_path / "out", input_file=str(text)))
    before = load_file(folder / "part-00000.safetensors")["embeddings"]
    changes = {"pooling": {"pooling": "cls"}, "precision": {"precision": "bf16"}}.get(changed, {})
    if changed == "text":
        text.write_text("\n".join(reversed(TEXTS)))
    if changed == "model":
        weights = load_file(model / "model.safetensors")
        save_file({name: weight * 2 for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    settings = settings_for(model, folder, input_file=str(text)).replace(**changes)
    flag = {"text": "--input-file", "model": "--model-name-or-path"}.get(changed, f"--{changed}")
    with pytest.raises(ValueError, match=f"{flag} was .* and is .*--overwrite-output-dir"):
        embed(settings)
    embed(settings.replace(overwrite_output_dir=True))
    assert not torch.equal(load_file(folder / "part-00000.safetensors")["embeddings"], before)


def test_parts_are_not_continued_from_standard_input(pretrained, tmp_path, pipe):
    pipe("\n".join(TEXTS))
    embed(settings_for(pretrained, tmp_path))
    with pytest.raises(ValueError, match=r"perhaps of other texts than those on standard input"):
        embed(settings_for(pretrained, tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "first"}, "--layers must be one of embeddings, second-to-last, .*, got 'first'"),
        ({"pooling": "none", "output_format": "parquet"}, "use --output-format safetensors"),
        ({"text_column": "text"}, "--text-column would have no effect: the input is lines"),
        ({"texts_per_part": 0}, "--texts-per-part must be at least 1, got 0"),
        ({"text_column": "a", "input_file": "a.txt.gz"}, "--text-column would have no effect: the input is lines"),
    ],
)
def test_invalid_settings_raise(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings_for("m", tmp_path, **changes)


@pytest.mark.parametrize("fault", ["empty", "no column", "other run", "bad row"])
def test_an_error_before_any_work_stands_below_no_progress_bar(fault, pretrained, tmp_path, capfd):
    file, model = tmp_path / "a.jsonl", ["--model-name-or-path", str(pretrained), "--device", "cpu"]
    text = {"empty": "", "no column": '{"other": "a"}\n', "other run": '{"text": "a"}\n', "bad row": '{"text": 3}\n'}
    file.write_text(text[fault])
    arguments = ["embed", *model, "--input-file", str(file), "--output-dir", str(tmp_path / "out")]
    if fault == "other run":
        assert main([*arguments, "--pooling", "cls"]) == 0
        assert "embed:" in capfd.readouterr().err  # the progress bar of a run that is not refused
    assert main(arguments) == 1
    error = capfd.readouterr().err
    assert error.startswith("bertfast embed: ")
    assert error.count("\n") == 1


def test_layers_that_the_model_does_not_have_are_said(pretrained, tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a film\n")
    embed(settings_for(pretrained, tmp_path / "out", input_file=str(tmp_path / "a.txt"), layers="concat-last-four"))
    assert "--layers concat-last-four: the model has 2 hidden states, all of which are used" in caplog.text


def test_cut_texts_are_counted_over_all_parts(pretrained, tmp_path, caplog):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    options = {"input_file": str(tmp_path / "texts.txt"), "texts_per_part": 2, "max_seq_length": 5}
    embed(settings_for(pretrained, tmp_path / "out", **options))
    assert [r.getMessage() for r in caplog.records if "cut" in r.getMessage()] == [
        f"--input-file {tmp_path / 'texts.txt'}: cut 3 of 5 texts to 5 tokens"
    ]


def test_a_second_text_that_begins_in_a_later_part_is_refused(pretrained, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"sentence1": "a"}\n' * 2 + '{"sentence1": "a", "sentence2": "b"}\n')
    with pytest.raises(ValueError, match="line 3: the text column 'sentence2', which the first rows lack"):
        embed(settings_for(pretrained, tmp_path / "out", input_file=str(path), texts_per_part=2))


@pytest.mark.parametrize("piped", [True, False])
def test_ctrl_c_says_how_to_go_on(piped, pretrained, tmp_path, pipe, monkeypatch, capfd):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("bertfast.inference.embed.compute_embeddings", stop)
    (tmp_path / "a.txt").write_text("a\nb\n")
    pipe("a\nb\n")
    source = [] if piped else ["--input-file", str(tmp_path / "a.txt")]
    arguments = ["--model-name-or-path", str(pretrained), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["embed", *arguments, *source]) == 130
    error = capfd.readouterr().err
    assert ("pass it with --input-file and --overwrite-output-dir" in error) == piped
    assert ("run the same command again to continue" in error) == (not piped)
