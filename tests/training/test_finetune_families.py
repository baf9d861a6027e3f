"""Programs on models of other families than BERT: their tokens and outputs are those of transformers."""

import json

import numpy as np
import pytest
import torch
import transformers
from family_models import CASES, PREFIXES, has_class, plain, write_model
from sentiment import FILLERS
from task_examples import settings_for, write_examples
from tokenizers.pre_tokenizers import ByteLevel

from bertfast.cli.main import main
from bertfast.inference.predict import open_finetuned, predict_outputs
from bertfast.tasks.settings import TaskSettings
from bertfast.training.finetuning import finetune

TASKS = ("sequence-classification", "token-classification", "question-answering", "multiple-choice")
TEXTS = ["the film was good", "a bad film it was", "what film", " ".join(FILLERS)] * 10
HEADS = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "multiple-choice": "ForMultipleChoice",
}
FAST = [("roberta", TASKS[0]), ("xlm-roberta", TASKS[2]), ("electra", TASKS[3]), ("distilbert", TASKS[1])]
FAST += [(family, TASKS[0]) for family in ("modernbert", "nomic_bert", "eurobert") if family in PREFIXES]
CLASSES = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "multiple-choice": transformers.AutoModelForMultipleChoice,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def hf_inputs(task, examples, folder):
    """Tokenize the first two examples as transformers' scripts do."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if task == "token-classification" and isinstance(tokenizer.backend_tokenizer.pre_tokenizer, ByteLevel):
        # Some classes ignore the option of this name, and others require it.
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
        tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    if task == "sequence-classification":
        return [tokenizer(text, return_tensors="pt") for text in examples.texts[:2]]
    if task == "token-classification":
        return [tokenizer(words, is_split_into_words=True, return_tensors="pt") for words in examples.words[:2]]
    if task == "question-answering":
        return [tokenizer(one.question, one.context, return_tensors="pt") for one in examples.questions[:2]]
    rows = zip(examples.texts[:2], examples.endings[:2], strict=True)
    batches = [tokenizer([text] * len(endings), endings, return_tensors="pt", padding=True) for text, endings in rows]
    return [{name: x[None] for name, x in batch.items()} for batch in batches]


def hf_logits(outputs):
    logits = outputs.logits if "logits" in outputs else torch.stack([outputs.start_logits, outputs.end_logits], -1)
    return logits[0].detach().float().numpy()


def check(family, task, tmp_path):
    """Fine-tune a model, and compare its tokens and logits with those of transformers."""
    model = write_model(family, tmp_path / "model", TEXTS)
    file, folder = write_examples(tmp_path, task, 24, 0), tmp_path / "tuned"
    finetune(settings_for(task, model, file, folder, precision="fp32", num_train_epochs=1))
    settings = TaskSettings.of(model_name_or_path=str(folder), precision="fp32", device="cpu")
    chosen, opened, tokenizer = open_finetuned(settings)
    assert opened.config.model_type == family
    examples, features = chosen.featurize(chosen.read(str(file), labelled=True), tokenizer, 76)
    outputs = predict_outputs(chosen, opened, features)
    hf = CLASSES[task].from_pretrained(folder).eval()
    for index, inputs in enumerate(hf_inputs(task, examples, folder)):
        if task != "multiple-choice":
            ids = features.token_ids[slice(*features.cu_seqlens[index : index + 2])]
            assert ids.tolist() == inputs["input_ids"][0].tolist()
        expected = hf_logits(hf(**inputs))
        np.testing.assert_allclose(outputs[index], expected, rtol=1e-3, atol=1e-4)
    return folder, file


@pytest.mark.parametrize(("family", "task"), FAST)
def test_a_fine_tuned_model_predicts_what_transformers_computes(family, task, tmp_path):
    check(family, task, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", PREFIXES)
def test_all_tasks_of_all_families(family, task, tmp_path, capsys):
    if not has_class(family, HEADS[task]):
        with pytest.raises(ValueError, match=f"transformers has no .*{HEADS[task]}, so this task requires a model"):
            check(family, task, tmp_path)
        return
    folder, file = check(family, task, tmp_path)
    assert main(["predict", "--model-name-or-path", str(folder), "--input-file", str(file)]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 24
    assert main(["evaluate", "--model-name-or-path", str(folder), "--validation-file", str(file)]) == 0
    assert "eval_samples" in capsys.readouterr().out
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:8]))
    assert main(["verify", str(folder), "--input-file", str(tmp_path / "texts.txt")]) == 0
    assert "is as accurate in bertfast as in transformers" in capsys.readouterr().out
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert "that transformers can load" in capsys.readouterr().out
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("the film").input_ids == transformers.AutoTokenizer.from_pretrained(folder)("the film").input_ids


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", PREFIXES)
def test_a_graph_gives_the_outputs_of_the_model(family, tmp_path, capsys):
    model = write_model(family, tmp_path / "model", TEXTS)
    assert main(["export", str(model), str(tmp_path / "out"), "--to", "torch-export"]) == 0
    assert "for any batch size and sequence length" in capsys.readouterr().out


MASKS = {"roberta": "<mask>", "distilbert": "[MASK]", "eurobert": "<|mask|>"}


@pytest.mark.parametrize(("family", "mask"), [(family, mask) for family, mask in MASKS.items() if family in PREFIXES])
def test_masked_tokens_are_predicted(family, mask, tmp_path, capsys):
    model = write_model(family, tmp_path / "model", TEXTS)
    assert main(["fill-mask", str(model), f"the film was {mask}", "--top-k", "1"]) == 0
    printed = capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(f"the film was {mask}", return_tensors="pt")
    logits = transformers.AutoModelForMaskedLM.from_pretrained(model).eval()(**inputs).logits[0]
    row = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
    best = logits[row, : tokenizer.vocab_size].argmax()
    assert tokenizer.convert_ids_to_tokens(int(best)) in printed
    assert main(["fill-mask", str(model), "the film"]) == 1
    assert f"write {mask} where a token is to be predicted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in ("camembert", "distilbert") else pytest.mark.exhaustive)
        for family in PREFIXES
    ],
)
def test_embeddings_are_those_of_transformers(family, tmp_path):
    model, texts = write_model(family, tmp_path / "model", TEXTS), tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS[:3]))
    command = ["embed", "--model-name-or-path", str(model), "--input-file", str(texts), "--pooling", "cls"]
    assert main([*command, "--output-dir", str(tmp_path / "out"), "--precision", "fp32"]) == 0
    from safetensors.torch import load_file

    found = load_file(next((tmp_path / "out").glob("part-*.safetensors")))["embeddings"]
    tokenizer, hf = transformers.AutoTokenizer.from_pretrained(model), transformers.AutoModel.from_pretrained(model)
    for text, embedding in zip(TEXTS[:3], found, strict=True):
        expected = hf.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0]
        torch.testing.assert_close(embedding, expected, rtol=1e-3, atol=1e-4)


def test_what_a_family_lacks_is_refused_in_one_sentence(tmp_path, capsys):
    model = write_model("roberta", tmp_path / "model", TEXTS)
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    names = ["--model-name-or-path", str(model)]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"bilstm": True}))
    assert main(["embed", *names, "--input-file", str(tmp_path / "text.txt"), "--output-dir", str(tmp_path / "y")]) != 0
    assert "that of a roberta, and only BERT can have bilstm" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_class_is_exported(case, tmp_path, capsys):
    plain(case).save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    assert f"holds a {case.class_name} that transformers can load" in capsys.readouterr().out
