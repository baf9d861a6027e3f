"""Byte-level BPE and Unigram vocabularies: transformers opens them, and their tokens show where words begin."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.shards import Shards
from bertfast.data.tokenizer import (
    BERT_TOKENS,
    ROBERTA_TOKENS,
    continuation_tokens,
    encode_sentences,
    load_tokenizer,
    save_tokenizer,
    special_tokens,
    tokenizer_hash,
    train_tokenizer,
)
from bertfast.models.tokenizers import load_any_tokenizer, template

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Dogs and foxes, foxes and dogs! Un été à Zürich."] * 5
KINDS = ("bpe", "unigram")
SIZE = {"bpe": 320, "unigram": 128}


def trained(kind, **options):
    return train_tokenizer(TEXTS, SIZE[kind], kind=kind, **options)


def words_of(tokenizer, text):
    """Return the tokens of a text, grouped into words."""
    (ids,) = encode_sentences(tokenizer, [text])
    continues, words = continuation_tokens(tokenizer), []
    for token in ids:
        if continues[token]:
            words[-1].append(tokenizer.id_to_token(token))
        else:
            words.append([tokenizer.id_to_token(token)])
    return words


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [320, 1000])
def test_a_trained_vocabulary_has_the_size_that_was_asked_for(kind, size):
    tokenizer = train_tokenizer(TEXTS, size, kind=kind)
    assert tokenizer.get_vocab_size() == -(-size // 64) * 64
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))
    assert "[unused 0]" in tokenizer.get_vocab()  # the text is short
    assert not [token for token in tokenizer.encode(" ".join(TEXTS)).tokens if "unused" in token]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bert_special_tokens", [False, True])
def test_transformers_opens_a_trained_tokenizer(kind, bert_special_tokens, tmp_path):
    tokenizer = trained(kind, bert_special_tokens=bert_special_tokens)
    save_tokenizer(tokenizer, tmp_path)
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "a new word, 3.14", "été"):
        assert hf(text).input_ids == tokenizer.encode(text).ids
        assert hf(text, "fox").input_ids == tokenizer.encode(text, "fox").ids
        assert set(hf(text)) == {"input_ids", "attention_mask"}
    special = special_tokens(tokenizer)
    names = ("pad", "unk", "cls", "sep", "mask")
    assert [getattr(hf, f"{name}_token_id") for name in names] == [getattr(special, name) for name in names]
    ids = hf(f"The fox {hf.mask_token} dogs").input_ids
    assert ids.count(hf.mask_token_id) == 1
    around = template(tokenizer)
    assert (around.start, around.end, around.end_of_pair) == ([special.cls], [special.sep], [special.sep])
    assert around.middle == ([special.sep] if bert_special_tokens else [special.sep, special.sep])
    assert (special.cls, special.pad, special.sep, special.unk) == (
        (2, 0, 3, 1) if bert_special_tokens else (0, 1, 2, 3)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_loaded_by_every_program_and_has_the_same_hash(kind, tmp_path):
    tokenizer = trained(kind)
    save_tokenizer(train_tokenizer(TEXTS, 64), tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    assert not (tmp_path / "vocab.txt").exists()
    opened = [load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json"), load_any_tokenizer(tmp_path)]
    assert {tokenizer_hash(one) for one in opened} == {tokenizer_hash(tokenizer)}
    text = "The lazy dogs jump."
    assert opened[0].decode(opened[0].encode(text).ids).strip() == text


def test_the_hash_of_unigram_depends_on_the_scores():
    one = trained("unigram")
    state = json.loads(one.to_str())
    state["model"]["vocab"][20][1] -= 1
    assert tokenizer_hash(Tokenizer.from_str(json.dumps(state))) != tokenizer_hash(one)


def test_a_vocabulary_of_bpe_depends_on_the_text_alone_and_not_on_the_process():
    """Nor on the order of the texts."""
    program = (
        "import random\n"
        "from bertfast.data.tokenizer import tokenizer_hash, train_tokenizer\n"
        "draw = random.Random(0)\n"
        "words = [''.join(draw.choices('abcdefghi', k=draw.randint(2, 7))) for _ in range(500)]\n"
        "texts = [' '.join(draw.choices(words, k=20)) for _ in range(300)]\n"
        "for texts in (texts, texts[::-1]):\n"
        "    print(tokenizer_hash(train_tokenizer(texts, 512, kind='bpe')))"
    )
    lines = set()
    for seed, threads in (("1", "1"), ("2", "3")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        ran = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        lines |= {*ran.stdout.splitlines()}
    assert len(lines) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_what_is_between_spaces(kind):
    text = "The foxes jump over Zürich, lazy dogs!"
    words = words_of(trained(kind), text)
    assert len(words) == len(text.split())
    assert max(map(len, words)) > 1
    assert words[0][0][0] in "Ġ▁"


def test_wordpiece_words_are_as_before():
    tokenizer = train_tokenizer(TEXTS, 512)
    words = words_of(tokenizer, "foxes, dogs")
    assert ["".join(word).replace("##", "") for word in words] == ["foxes", ",", "dogs"]


def test_whole_words_of_a_tokenizer_without_marks_are_refused_with_the_reason():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    with pytest.raises(ValueError, match=r"--whole-word requires .* this BPE tokenizer has no such mark: leave it out"):
        continuation_tokens(tokenizer)
    assert continuation_tokens(tokenizer, whole_word=False).tolist() == [False] * 5


@pytest.mark.parametrize("kind", ["wordpiece", *KINDS])
def test_names_of_special_tokens_in_a_text_are_text(kind):
    tokenizer = train_tokenizer([*TEXTS, "a<mask> <s> [MASK]"], 320, kind=kind)
    if kind == "unigram":  # the published ones have scores of 0, which make these names the best pieces
        state = json.loads(tokenizer.to_str())
        for published in (False, True):
            if published:
                state["model"]["vocab"][:5] = [[piece, 0.0] for piece, _ in state["model"]["vocab"][:5]]
            again = Tokenizer.from_str(json.dumps(state))
            _assert_text(again)
            if not published:
                (ids,) = encode_sentences(again, ["a <s> b"])
                assert special_tokens(again).unk not in ids
    _assert_text(tokenizer)


@pytest.mark.parametrize("bert_special_tokens", [False, True])
@pytest.mark.parametrize("kind", ["wordpiece", *KINDS])
def test_names_of_special_tokens_that_are_frequent_in_a_text_are_not_in_the_vocabulary_twice(
    kind, bert_special_tokens, tmp_path
):
    names = [*BERT_TOKENS.values(), *ROBERTA_TOKENS.values()]
    texts = [f"{name} x{name} {text} {name}{name} fox{name}jumps" for name in names for text in TEXTS] * 20
    tokenizer = train_tokenizer(texts, 448, kind=kind, bert_special_tokens=bert_special_tokens)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    assert len(vocabulary) == tokenizer.get_vocab_size() == 448
    special = ROBERTA_TOKENS if kind != "wordpiece" and not bert_special_tokens else BERT_TOKENS
    assert [tokenizer.id_to_token(token) for token in range(5)] == [*special.values()]
    if kind == "unigram":
        assert vocabulary[json.loads(tokenizer.to_str())["model"]["unk_id"]][0] == special["unk"]
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    for ids in encode_sentences(again, [f"fox {name} jumps" for name in names]):
        assert not set(ids) & set(range(5))


def test_prepare_refuses_a_trained_vocabulary_with_gaps(tmp_path, monkeypatch):
    broken = train_tokenizer(TEXTS, 128, kind="unigram")
    state = json.loads(broken.to_str())
    state["model"]["vocab"].append(["<unk>", -5.0])
    monkeypatch.setattr("bertfast.data.prepare.train_tokenizer", lambda *_, **__: Tokenizer.from_str(json.dumps(state)))
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    corpus = CorpusSettings([str(tmp_path / "a.txt")], tokenizer_type="unigram", processes=1)
    with pytest.raises(ValueError, match="the token ids in the trained vocabulary have gaps"):
        prepare(PrepareSettings(str(tmp_path / "out"), corpus))


def _assert_text(tokenizer):
    special = special_tokens(tokenizer)
    for ids in encode_sentences(tokenizer, ["The <mask> fox <s> </s> jumps", "[MASK] [SEP] dog<mask>", "<pad>"]):
        assert not {special.pad, special.cls, special.sep, special.mask} & set(ids)
        assert ids


def test_rare_characters_are_left_out_of_a_small_unigram_vocabulary():
    tokenizer = train_tokenizer([*TEXTS, "".join(map(chr, range(0x4E00, 0x4F00)))], 128, kind="unigram")
    assert tokenizer.get_vocab_size() == 128
    (ids,) = encode_sentences(tokenizer, ["fox 一"])
    assert special_tokens(tokenizer).unk in ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_word_does_not_slow_down_training(kind):
    tokenizer = train_tokenizer([*TEXTS, "x" * 100_000], 384, kind=kind)
    assert max(map(len, tokenizer.get_vocab())) <= 110


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_empty_texts_is_refused(kind):
    with pytest.raises(ValueError, match="no text to train"):
        train_tokenizer([" ", "", "\x01"] if kind == "unigram" else [" ", ""], 320, kind=kind)


def test_a_tokenizer_with_gaps_or_of_another_kind_is_refused_by_name(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.save(str(path))
    with pytest.raises(ValueError, match=r"tokenizer\.json holds a WordLevel model: use a tokenizer of"):
        load_tokenizer(path)
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.add_special_tokens([AddedToken(name) for name in ("<s>", "<pad>", "</s>", "<unk>")])
    tokenizer.save(str(path))
    with pytest.raises(ValueError, match="the vocabulary has no <mask>, which RoBERTa requires"):
        load_tokenizer(path)


def test_a_folder_that_only_transformers_reads_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"neither a tokenizer\.json nor .*AutoTokenizer\.from_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_prepared_with_a_vocabulary_of_each_kind(kind, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(["The quick brown fox. The lazy dog jumps.\nDogs and foxes."] * 9))

    def run(name, **options):
        corpus = CorpusSettings([str(tmp_path / "a.txt")], validation_split_percentage=0, processes=1, **options)
        return prepare(PrepareSettings(str(tmp_path / name), corpus))

    folder = run("out", tokenizer_type=kind, vocab_size=320)
    shards = Shards.open(folder / "train")
    tokenizer = load_tokenizer(folder)
    assert shards.vocab_size == tokenizer.get_vocab_size() == 320
    part = shards.parts[0]
    tokens = np.asarray(part.tokens[part.sentence_starts[0] : part.sentence_starts[2]]).tolist()
    assert tokenizer.decode(tokens).strip() == "The quick brown fox. The lazy dog jumps."
    assert (~continuation_tokens(tokenizer)[tokens]).sum() == 8
    run("out", tokenizer_type=kind, vocab_size=320)
    with pytest.raises(ValueError, match=f"--tokenizer-type was {json.dumps(kind)} and is null"):
        run("out", vocab_size=320)
    again = run("again", tokenizer_name=str(folder))
    assert Shards.open(again / "train").content_hash == shards.content_hash


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({"tokenizer_type": "bpe", "vocab_size": 256}, "--vocab-size must be at least 257 with --tokenizer-type bpe"),
        ({"tokenizer_type": "bpe", "cased": True}, "--cased would have no effect: a bpe vocabulary always"),
        ({"bert_special_tokens": True}, "--bert-special-tokens would have no effect: it is for --tokenizer-type bpe"),
        ({"tokenizer_type": "bpe", "tokenizer_name": "t"}, "--tokenizer-type would have no effect: --tokenizer-name"),
        ({"tokenizer_type": "words"}, "--tokenizer-type must be wordpiece, bpe or unigram, got 'words'"),
    ],
)
def test_contradictory_settings_are_refused(corpus, message):
    with pytest.raises(ValueError, match=message):
        CorpusSettings(**corpus)
