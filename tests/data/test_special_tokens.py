"""Special tokens are found by their roles: those of BERT and RoBERTa, and others of BPE and Unigram."""

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from bertfast.data.masking import Masker
from bertfast.data.samples import Sampling
from bertfast.data.special_tokens import mask_token, special_tokens, unknown_token
from bertfast.data.tokenizer import continuation_tokens, load_tokenizer, save_tokenizer

TEXT = "a dog and a fox"
LLAMA = {"cls": "<|begin_of_text|>", "sep": "<|end_of_text|>", "mask": "<|mask|>"}  # those of EuroBERT
GEMMA = {"pad": "<pad>", "sep": "<eos>", "cls": "<bos>", "unk": "<unk>", "mask": "<mask>"}  # those of mmBERT


def written(folder, names, *more):
    """Write a byte-level tokenizer with special tokens into a folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in (*names.values(), *more)])
    around = {role: names[role] for role in ("cls", "sep") if role in names}
    if around:
        single = " ".join([around.get("cls", ""), "$A", around.get("sep", "")]).strip()
        ids = [(name, tokenizer.token_to_id(name)) for name in around.values()]
        pair = f"{single} $B {around.get('sep', '')}".strip()
        tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("names", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_special_tokens_of_other_names_are_found_and_saved_for_transformers(names, tmp_path):
    tokenizer = load_tokenizer(written(tmp_path / "a", names, "<mask_of_images>"))
    expected = {"pad": names["sep"]} | names
    special = special_tokens(tokenizer)
    found = {role: tokenizer.id_to_token(getattr(special, role)) for role in expected}
    assert found == expected
    assert (special.unk is None) == ("unk" not in names)
    assert mask_token(tokenizer) == names["mask"]
    assert unknown_token(tokenizer) == names.get("unk", names["mask"])
    save_tokenizer(tokenizer, tmp_path / "b")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert {role: getattr(hf, f"{role}_token") for role in expected} == expected
    assert (hf.bos_token, hf.eos_token) == (names["cls"], names["sep"])
    assert hf(TEXT).input_ids == tokenizer.encode(TEXT).ids
    assert special_tokens(load_tokenizer(tmp_path / "b")) == special


def test_masked_tokens_are_not_replaced_by_special_ones(tmp_path):
    tokenizer = load_tokenizer(written(tmp_path, LLAMA))
    special = special_tokens(tokenizer)
    masker = Masker(special, continuation_tokens(tokenizer), Sampling(objective="mlm"), 0)
    ids = {special.pad, special.cls, special.sep, special.mask}
    assert {*np.arange(tokenizer.get_vocab_size())} - {*masker.replacements} == ids


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"cls": "<|begin|>", "sep": "<|end|>"}, "no special token named mask"),
        ({"mask": "<|mask|>"}, "no special token before a text and none after a text"),
        ({"cls": "<|begin|>", "mask": "<|mask|>"}, "no special token after a text"),
        ({"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>"}, "no <mask>, which RoBERTa requires"),
    ],
)
def test_a_vocabulary_that_lacks_one_is_refused_with_what_it_lacks(names, message, tmp_path):
    with pytest.raises(ValueError, match=f"not the vocabulary of an encoder: the vocabulary has .*{message}$"):
        load_tokenizer(written(tmp_path, names))


def test_a_vocabulary_without_a_mask_fills_none(tmp_path):
    tokenizer = Tokenizer.from_file(str(written(tmp_path, {"cls": "<|begin|>", "sep": "<|end|>"}) / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no \[MASK\] and no <mask>, and no other special token named mask"):
        mask_token(tokenizer)
