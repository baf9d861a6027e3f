"""Options of `from_pretrained` and `save_pretrained`, tracing and the hub: what fused classes inherit works on them."""

import shutil
from unittest import mock

import pytest
import torch
import transformers
from parity import SIZES

import bertfast


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a masked-LM model."""
    folder = tmp_path_factory.mktemp("saved")
    bertfast.BertForMaskedLM(transformers.BertConfig(**SIZES)).save_pretrained(folder)
    return folder


def test_a_model_in_a_subfolder_is_loaded(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "inner")
    model = bertfast.BertForMaskedLM.from_pretrained(tmp_path, subfolder="inner")
    other = bertfast.BertForMaskedLM.from_pretrained(saved)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("auto", [False, True], ids=["class", "auto"])
def test_cache_folder_and_revision_are_those_of_the_hub(auto, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # adapters are looked for there
    kind = bertfast.AutoModelForMaskedLM if auto else bertfast.BertForMaskedLM
    repository, commit = tmp_path / "models--someone--bert", "0123456789" * 4
    shutil.copytree(saved, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    where = {"cache_dir": str(tmp_path), "local_files_only": True, "token": False}
    assert isinstance(kind.from_pretrained("someone/bert", revision="v2", **where), bertfast.BertForMaskedLM)


def test_mismatched_sizes_are_initialised_if_that_is_asked_for(saved):
    with pytest.raises((RuntimeError, ValueError)):
        bertfast.BertForMaskedLM.from_pretrained(saved, vocab_size=77)
    model = bertfast.BertForMaskedLM.from_pretrained(saved, vocab_size=77, ignore_mismatched_sizes=True)
    assert model.bert.embeddings.word_embeddings.weight.shape[0] == 77


def test_dynamically_quantised_linears_are_called(saved):
    model = bertfast.BertForMaskedLM.from_pretrained(saved).eval()
    ids = torch.tensor([[2, 9, 17, 4, 3]])
    expected = model(ids).logits
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    logits = quantised(ids).logits
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, atol=0.1, rtol=0.1)


def test_push_to_hub_uploads_a_folder_that_transformers_opens(saved, tmp_path):
    model = bertfast.BertForMaskedLM.from_pretrained(saved)

    def upload(self, working_dir, *arguments, **options):
        shutil.copytree(working_dir, tmp_path / "uploaded")

    created = mock.Mock(repo_id="someone/bert")
    hub = "transformers.utils.hub"
    with (
        mock.patch.object(transformers.PreTrainedModel, "_upload_modified_files", upload),
        mock.patch(f"{hub}.hf_api", create=True) as api,
        mock.patch(f"{hub}.create_repo", return_value=created, create=True),
        mock.patch(f"{hub}.create_and_tag_model_card"),
    ):
        api.return_value.create_repo.return_value = created
        model.push_to_hub("someone/bert")
    _, info = transformers.BertForMaskedLM.from_pretrained(tmp_path / "uploaded", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


class Head(bertfast.BertPreTrainedModel):
    """A user's model on the exported base class."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = bertfast.BertModel(config)
        self.score = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids):
        return self.score(self.bert(input_ids).pooler_output)


def test_post_init_initialises_a_users_model_and_loading_finds_its_encoder(saved):
    model = Head.from_pretrained(saved)
    assert model.score.weight.std() < 0.1  # initializer_range
    assert not model.score.bias.any()
    expected = bertfast.BertForMaskedLM.from_pretrained(saved).bert
    for name, x in expected.named_parameters():
        assert torch.equal(x, model.bert.get_parameter(name))


def test_a_traced_model_gives_the_outputs_of_the_model(saved):
    model = bertfast.BertForMaskedLM.from_pretrained(saved, attn_implementation="eager").eval()
    ids, mask = torch.tensor([[2, 9, 17, 4, 3], [2, 5, 3, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    with torch.no_grad():
        model.config.return_dict = False
        traced = torch.jit.trace(model, (ids, mask))
        logits, expected = traced(ids, mask)[0], model(ids, mask)[0]
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
