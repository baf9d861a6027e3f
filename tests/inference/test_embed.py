"""Features of texts: transformers' hidden states, in parts on disk."""

import io

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from bertfast.data.tokenizer import load_tokenizer
from bertfast.inference.embed import ExtractSettings, extract
from bertfast.models.extensions import LAYERS, select_layers

TEXTS = ["the film was good", "bad", "a very bad plot and a good actor", "the", "music with a plot"]


def settings_for(model, folder, **changes) -> ExtractSettings:
    return ExtractSettings(
        model_name_or_path=str(model), output_dir=str(folder), device="cpu", precision="fp32", **changes
    )


def their_states(model) -> list[list[torch.Tensor]]:
    """Of each text, the embeddings and every layer's output [tokens, H]."""
    theirs, tokenizer = transformers.BertModel.from_pretrained(model).eval(), load_tokenizer(model)
    with torch.no_grad():
        texts = [torch.tensor([tokenizer.encode(text).ids]) for text in TEXTS]
        return [[state[0] for state in theirs(ids, output_hidden_states=True).hidden_states] for ids in texts]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("pool", ["mean", "cls", "tokens"])
def test_features_are_transformers_hidden_states(layers, pool, pretrained, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    changes = {"layers": layers, "pool": pool, "eval_tokens": 12, "texts_per_part": 2}
    folder = extract(settings_for(pretrained, tmp_path / "out", input_file=str(tmp_path / "texts.txt"), **changes))
    parts = sorted(folder.iterdir())
    assert [part.name for part in parts] == [f"part-0000{i}.safetensors" for i in range(3)]
    found = [load_file(part) for part in parts]
    rows = torch.cat([part["features"] for part in found])
    expected = []
    for states in their_states(pretrained):
        numbers, side_by_side = select_layers(layers, transformers.BertConfig.from_pretrained(pretrained))
        chosen = [states[number] for number in numbers]
        state = torch.cat(chosen, 1) if side_by_side else torch.stack(chosen).mean(0)
        expected.append({"mean": state.mean(0, keepdim=True), "cls": state[:1], "tokens": state}[pool])
    torch.testing.assert_close(rows, torch.cat(expected), atol=1e-5, rtol=1e-4)
    if pool == "tokens":
        lengths = np.concatenate([part["starts"].diff() for part in found])
        assert lengths.tolist() == [len(state) for state in expected]


def test_parquet_and_tables_and_standard_input(pretrained, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "a.tsv"
    table.write_text("\n".join(["sentence\tlabel", *(f"{text}\t1" for text in TEXTS)]))
    folder = extract(settings_for(pretrained, tmp_path / "one", input_file=str(table), form="parquet"))
    rows = parquet.read_table(folder / "part-00000.parquet")["features"].to_pylist()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS)))
    other = extract(settings_for(pretrained, tmp_path / "two"))
    torch.testing.assert_close(torch.tensor(rows), load_file(other / "part-00000.safetensors")["features"])


def test_finished_parts_are_not_made_again(pretrained, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    settings = settings_for(pretrained, tmp_path / "out", input_file=str(tmp_path / "texts.txt"), texts_per_part=2)
    folder = extract(settings)
    (folder / "part-00001.safetensors").unlink()
    before = (folder / "part-00000.safetensors").stat().st_mtime_ns
    extract(settings)
    assert (folder / "part-00000.safetensors").stat().st_mtime_ns == before
    assert (folder / "part-00001.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "first"}, "no features 'first'; there are embeddings, second-to-last"),
        ({"pool": "tokens", "form": "parquet"}, "write the features of tokens as safetensors"),
        ({"texts_per_part": 0}, "texts_per_part is at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings_for("m", tmp_path, **changes)
