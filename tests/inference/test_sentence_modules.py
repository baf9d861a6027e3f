"""The modules of sentence-transformers around an encoder: `bertfast embed` gives what its `encode` gives."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from family_models import PREFIXES, write_model
from parity import assert_as_accurate_as_torch
from safetensors.torch import load_file, save_file
from torch import nn

from bertfast.inference.embed import EmbedSettings, embed
from bertfast.models.sentence_folder import read_sentence_modules

st = pytest.importorskip("sentence_transformers", reason="the extra `examples`")
modules = pytest.importorskip("sentence_transformers.models")

TEXTS = ["the film was good", "bad", "a very bad plot and a good actor", "", "The MUSIC with a plot"]
POOLINGS = ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


def embedded(model: Path, out: Path, **changes) -> torch.Tensor:
    """Return the embeddings of `TEXTS` that `bertfast embed` writes."""
    file = out.with_suffix(".txt")
    file.write_text("\n".join(TEXTS) + "\n")
    where = {"model_name_or_path": str(model), "output_dir": str(out), "input_file": str(file)}
    folder = embed(EmbedSettings.of(**where, device="cpu", **{"precision": "fp32", "eval_tokens": 20} | changes))
    return load_file(folder / "part-00000.safetensors")["embeddings"]


def assert_equal(actual: torch.Tensor, model: Path, **options) -> None:
    """Check embeddings of `TEXTS` by the accuracy rule against those of sentence-transformers, of fp32 and float64."""
    encoder = st.SentenceTransformer(str(model), device="cpu")
    expected = encoder.encode(TEXTS, convert_to_tensor=True, **options)
    truth = encoder.double().encode(TEXTS, convert_to_tensor=True, **options)
    assert_as_accurate_as_torch(actual, expected, truth, name="embeddings")


def save(folder: Path, out: Path, *others: nn.Module, length: int | None = None, lower=False, **options) -> Path:
    """Save a model of sentence-transformers with the encoder of a folder, and return its folder."""
    transformer = modules.Transformer(str(folder), max_seq_length=length, do_lower_case=lower)
    st.SentenceTransformer(modules=[transformer, *others], device="cpu", **options).save(str(out))
    return out


def change(path: Path, **entries) -> None:
    """Change entries of a JSON file; None removes one."""
    values = (json.loads(path.read_text()) if path.exists() else {}) | entries
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def pooling(mode="mean", size: int = 32, **options) -> nn.Module:
    return modules.Pooling(size, mode, **options)


@pytest.mark.parametrize("mode", [*POOLINGS, ("lasttoken", "cls", "weightedmean")])
def test_each_pooling_is_that_of_the_model(mode, pretrained, tmp_path):
    model = save(pretrained, tmp_path / "model", pooling(mode))
    assert_equal(embedded(model, tmp_path / "out"), model)


@pytest.mark.parametrize("mode", POOLINGS)
def test_poolings_of_older_files(mode, pretrained, tmp_path):
    model = save(pretrained, tmp_path / "model", pooling(mode))
    name = {"cls": "cls_token", "lasttoken": "lasttoken"}.get(mode, f"{mode}_tokens")
    name = name if mode != "mean_sqrt_len_tokens" else mode
    (model / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_max_tokens": False, f"pooling_mode_{name}": True})
    )
    assert read_sentence_modules(model).pooling == (mode,)
    assert_equal(embedded(model, tmp_path / "out"), model)


@pytest.mark.parametrize("activation", ["Tanh", "Identity", "GELU"])
@pytest.mark.parametrize("residual", [None, "identity", "linear"])
def test_projections_and_normalisation_follow(activation, residual, pretrained, tmp_path):
    torch.manual_seed(0)
    size = 32 if residual == "identity" else 12
    dense = modules.Dense(
        32,
        size,
        activation_function=getattr(nn, activation)(),
        use_residual=residual is not None,
        bias=residual is None,
    )
    model = save(pretrained, tmp_path / "model", pooling(), modules.Dropout(0.5), dense, modules.Normalize())
    found = embedded(model, tmp_path / "out")
    assert found.shape == (len(TEXTS), size)
    assert_equal(found, model)


@pytest.mark.parametrize("family", PREFIXES)
def test_models_of_other_families(family, tmp_path):
    encoder = write_model(family, tmp_path / "encoder", TEXTS * 10)
    model = save(encoder, tmp_path / "model", pooling("mean", 64), modules.Normalize(), length=7)
    assert_equal(embedded(model, tmp_path / "out"), model)


@pytest.mark.parametrize("older", [False, True])
def test_maximum_length_and_case(older, tmp_path):
    """Until version 5, sentence-transformers wrote both to sentence_bert_config.json; now the length is elsewhere."""
    encoder = write_model("roberta", tmp_path / "encoder", TEXTS * 10)
    model = save(encoder, tmp_path / "model", pooling("mean", 64), length=None if older else 6)
    if older:
        change(model / "sentence_bert_config.json", max_seq_length=6, do_lower_case=True)
    found = embedded(model, tmp_path / "out")
    assert_equal(found, model)
    change(model / "sentence_bert_config.json", max_seq_length=20)
    assert not torch.allclose(embedded(model, tmp_path / "longer"), found)
    assert torch.equal(embedded(model, tmp_path / "given", max_seq_length=6), found)
    change(model / "sentence_bert_config.json", max_seq_length=6, do_lower_case=not older)
    assert not torch.allclose(embedded(model, tmp_path / "other case"), found)


def test_a_maximum_length_above_the_positions_is_cut_to_them(pretrained, tmp_path):
    model = save(pretrained, tmp_path / "model", pooling(), length=512)
    assert embedded(model, tmp_path / "out").shape == (len(TEXTS), 32)


@pytest.mark.parametrize("family", ["electra", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("pools_prompt", [True, False])
def test_texts_are_truncated_at_the_side_of_the_tokenizer(family, pools_prompt, tmp_path):
    encoder = write_model(family, tmp_path / "encoder", TEXTS * 10)
    options = {"prompts": {"query": "the "}, "default_prompt_name": "query"}
    model = save(encoder, tmp_path / "model", pooling("mean", 64, include_prompt=pools_prompt), length=6, **options)
    right = embedded(model, tmp_path / "right")
    change(model / "tokenizer_config.json", truncation_side="left")
    left = embedded(model, tmp_path / "left")
    assert_equal(left, model)
    assert not torch.allclose(left, right)


@pytest.mark.parametrize("normalizes", [False, True])
def test_embeddings_are_truncated_after_the_modules(normalizes, pretrained, tmp_path, caplog):
    caplog.set_level("INFO", "bertfast")
    others = [pooling(), modules.Dense(32, 12), *[modules.Normalize()] * normalizes]
    model = save(pretrained, tmp_path / "model", *others, truncate_dim=8)
    found = embedded(model, tmp_path / "out")
    assert found.shape == (len(TEXTS), 8)
    assert_equal(found, model)
    normalized = ", normalised" * normalizes
    assert f"{model}: pooling mean, projected to 12 elements{normalized}, truncated to 8 elements, at" in caplog.text
    again = embedded(model, tmp_path / "again", normalization="l2")
    assert_equal(again, model, normalize_embeddings=True)
    assert f"--normalization l2: {model} has no module Normalize after truncation" in caplog.text
    plain = embedded(model, tmp_path / "plain", normalization="none")
    assert torch.equal(plain, found) is not normalizes
    torch.testing.assert_close(torch.nn.functional.normalize(plain), again)
    bits = embedded(model, tmp_path / "bits", output_precision="ubinary")
    assert torch.equal(bits[:, 0], (found > 0).int() @ (2 ** torch.arange(7, -1, -1, dtype=torch.int32)))
    assert embedded(model, tmp_path / "tokens", pooling="none").shape[1] == 32  # of sentence-transformers neither
    for changes in ({"normalization": "l2"}, *[{"normalization": "none"}] * normalizes):
        with pytest.raises(ValueError, match=r"--normalization was"):
            embedded(model, tmp_path / "out", **changes)


def test_without_modules_the_tokenizer_has_the_maximum_length(pretrained, tmp_path):
    model = shutil.copytree(pretrained, tmp_path / "model")
    change(model / "tokenizer_config.json", model_max_length=6)
    assert_equal(embedded(model, tmp_path / "out"), model)
    assert not torch.allclose(embedded(pretrained, tmp_path / "longer"), embedded(model, tmp_path / "out"))


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("pools_prompt", [True, False])
def test_the_default_prompt_is_put_before_texts(mode, pools_prompt, pretrained, tmp_path):
    prompts = {"query": "the actor and the ", "other": "music "}
    options = {"prompts": prompts, "default_prompt_name": "query"}
    model = save(pretrained, tmp_path / "model", pooling(mode, include_prompt=pools_prompt), **options)
    assert_equal(embedded(model, tmp_path / "out"), model)
    assert_equal(embedded(model, tmp_path / "other", prompt_name="other"), model, prompt_name="other")
    assert_equal(embedded(model, tmp_path / "typed", prompt="plot "), model, prompt="plot ")
    assert_equal(embedded(model, tmp_path / "none", prompt_name="none"), model, prompt="")


def test_flags_replace_what_the_model_says(pretrained, tmp_path, caplog):
    caplog.set_level("INFO", "bertfast")
    options = {"prompts": {"query": "the "}, "default_prompt_name": "query"}
    model = save(pretrained, tmp_path / "model", pooling("cls"), modules.Normalize(), length=8, **options)
    embedded(model, tmp_path / "own")
    assert f"{model}: pooling cls, normalised, prompt 'the ', at most 8 tokens" in caplog.text
    assert "replaces" not in caplog.text
    changes = {"pooling": "mean", "normalization": "none", "prompt_name": "none", "max_seq_length": 24}
    found = embedded(model, tmp_path / "changed", **changes)
    assert_equal(found, pretrained)
    assert f"{model}: pooling mean, at most 24 tokens" in caplog.text
    for line in (
        f"--pooling mean replaces that of {model}, cls",
        f"--normalization none: {model} has a module Normalize",
        f"the prompt of {model}, 'the ', is replaced by ''",
        f"--max-seq-length replaces that of {model}, 8",
    ):
        assert line in caplog.text
    normalized = embedded(pretrained, tmp_path / "normalized", normalization="l2")
    assert_equal(normalized, pretrained, normalize_embeddings=True)


def test_embeddings_of_tokens_are_hidden_states(pretrained, tmp_path):
    model = save(pretrained, tmp_path / "model", pooling("cls"), modules.Normalize())
    expected = torch.cat(st.SentenceTransformer(str(model)).encode(TEXTS, output_value="token_embeddings"))
    torch.testing.assert_close(embedded(model, tmp_path / "out", pooling="none"), expected, rtol=1e-4, atol=1e-5)


def test_a_folder_of_an_older_layout(pretrained, tmp_path):
    model = save(pretrained, tmp_path / "model", pooling("max"))
    names = [path.name for path in model.iterdir() if path.is_file() and "modules" not in path.name]
    (model / "0_Transformer").mkdir()
    for name in names:
        shutil.move(model / name, model / "0_Transformer" / name)
    entries = json.loads((model / "modules.json").read_text())
    entries[0]["path"] = "0_Transformer"
    for entry in entries:
        entry["type"] = f"sentence_transformers.models.{entry['type'].rpartition('.')[2]}"
    (model / "modules.json").write_text(json.dumps(entries))
    assert_equal(embedded(model, tmp_path / "out"), model)


def test_a_changed_module_is_another_model(pretrained, tmp_path):
    model = save(pretrained, tmp_path / "model", pooling("cls"), modules.Dense(32, 8))
    embedded(model, tmp_path / "out")
    before = (model / "2_Dense" / "config.json").read_text()
    change(model / "2_Dense" / "config.json", activation_function="torch.nn.modules.linear.Identity")
    with pytest.raises(ValueError, match=r"--model-name-or-path was .* and is .*--overwrite-output-dir"):
        embedded(model, tmp_path / "out")
    (model / "2_Dense" / "config.json").write_text(before)
    embedded(model, tmp_path / "out")


_TYPES = "sentence_transformers.models."


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "median"}, r"the pooling 'median' is none of cls, max"),
        (
            "1_Pooling/config.json",
            {"pooling_mode": None, "pooling_mode_median_tokens": True},
            r"the pooling 'pooling_mode_median_tokens' is none of",
        ),
        ("1_Pooling/config.json", {"pooling_mode": [3]}, r"the pooling 3 is none of cls, max"),
        (
            "2_Dense/config.json",
            {"activation_function": "os.system"},
            r"activation_function os\.system is no activation",
        ),
        ("2_Dense/config.json", {"activation_function": "torch.nn.functional"}, r"functional is no activation"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Linear"}, r"torch\.nn\.Linear is no activation"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, r"module_input_name must be sentence_emb"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, r"transformer_task \"fill-mask\" is not supp"),
        ("sentence_bert_config.json", {"tokenizer_args": {"use_fast": False}}, r"tokenizer_args .* is not supported"),
        ("sentence_bert_config.json", {"modality_config": {"image": {}}}, r"only a modality_config of text"),
        ("sentence_bert_config.json", {"modality_config": {"text": "a"}}, r"only a modality_config of text"),
        ("sentence_bert_config.json", {"max_seq_length": "many"}, r"max_seq_length must be a number"),
        ("sentence_bert_config.json", {"max_seq_length": 2}, r"max_seq_length of 2: choose another one with --max"),
        ("config_sentence_transformers.json", {"default_prompt_name": "a"}, r"default_prompt_name 'a' is none of"),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": ["a"]},
            r"default_prompt_name \['a'\] is none of",
        ),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, r"prompts must be texts by name"),
        ("config_sentence_transformers.json", {"truncate_dim": 0}, r"truncate_dim must be a positive integer, got 0"),
        ("config_sentence_transformers.json", {"truncate_dim": True}, r"truncate_dim must be .*, got true"),
        ("config_sentence_transformers.json", {"truncate_dim": 4.0}, r"truncate_dim must be .*, got 4\.0"),
        ("config_sentence_transformers.json", {"truncate_dim": 9}, r"truncate_dim 9 is larger .* of 8 elements"),
        ("tokenizer_config.json", {"truncation_side": "both"}, r"truncation_side must be left or right, got \"both\""),
        ("config_sentence_transformers.json", {"model_type": "CrossEncoder"}, r"no module Pooling .* with --pooling"),
    ],
)
def test_what_is_not_supported_is_refused(file, entries, message, pretrained, tmp_path):
    model = save(pretrained, tmp_path / "model", pooling(), modules.Dense(32, 8))
    change(model / file, **entries)
    with pytest.raises(ValueError, match=message):
        embedded(model, tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize("fault", ["no weight", "other size", "NaN"])
def test_damaged_weights_of_a_projection_are_refused(fault, pretrained, tmp_path):
    model = save(pretrained, tmp_path / "model", pooling(), modules.Dense(32, 8))
    path = model / "2_Dense" / "model.safetensors"
    weights = load_file(path)
    if fault == "no weight":
        del weights["linear.weight"]
    elif fault == "other size":
        weights["linear.bias"] = torch.zeros(9)
    else:
        weights["linear.weight"][3, 3] = float("nan")
    save_file(weights, path)
    message = "no linear.weight, which its" if fault == "no weight" else "do not fit or are not finite"
    with pytest.raises(ValueError, match=message):
        embedded(model, tmp_path / "out")


def test_embeddings_of_a_published_model(tmp_path):
    model = next(Path(__file__).parents[2].glob("build/minilm/*/model"), None)
    if model is None:
        pytest.skip("`make build/minilm` fetches all-MiniLM-L6-v2")
    found = embedded(model, tmp_path / "out")
    assert_equal(found, model)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(TEXTS)))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("Transformer", ""), ("LSTM", "1_LSTM")], r"has the module LSTM, which is not supported"),
        ([("Transformer", ""), ("Pooling", "1_Pooling"), ("Pooling", "1_Pooling")], r"has the module Pooling"),
        ([("Transformer", ""), ("Normalize", "1_Normalize")], r"has the module Normalize"),
        ([("Transformer", "")], r"has no module Pooling of its own: choose one with --pooling"),
        ([("WordEmbeddings", "")], r"begins with a module WordEmbeddings"),
        ([("Transformer", ""), ("Pooling", "../other")], r"the path '\.\./other' is not a folder inside"),
        ([], r"must hold a list of modules"),
    ],
)
def test_other_modules_are_refused_by_name(entries, message, pretrained, tmp_path):
    model = save(pretrained, tmp_path / "model", pooling())
    listed = [{"type": f"{_TYPES}{kind}", "path": path} for kind, path in entries]
    (model / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=message):
        embedded(model, tmp_path / "out")


def test_code_of_a_model_is_refused(pretrained, tmp_path):
    model = save(pretrained, tmp_path / "model", pooling())
    (model / "modules.json").write_text(json.dumps([{"type": "custom.Transformer", "path": ""}]))
    with pytest.raises(ValueError, match=r"begins with a module custom\.Transformer"):
        embedded(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_name": "passage"}, r"--prompt-name passage: .* has document, query"),
        ({"pooling": "none", "normalization": "l2"}, r"--normalization would have no effect"),
        ({"prompt": "a", "prompt_name": "query"}, r"--prompt and --prompt-name exclude each other"),
        ({"prompt": "the film was good and the actor bad " * 4}, r"the prompt has \d+ tokens, and texts at most 24"),
        ({"layers": "concat-last-four"}, r"module Dense takes embeddings of 32 elements, and .* give 64"),
    ],
)
def test_flags_that_contradict_the_model_are_refused(changes, message, pretrained, tmp_path):
    others = [pooling(include_prompt=False), modules.Dense(32, 8)]
    model = save(pretrained, tmp_path / "model", *others, prompts={"query": "the "})
    with pytest.raises(ValueError, match=message):
        embedded(model, tmp_path / "out", **changes)
