"""Trained vocabularies cover their text; loaded tokenizers give the token ids that `transformers` gives."""

import json
import lzma
import os
import subprocess
import sys

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models

from bertfast.data.tokenizer import (
    SPECIAL_TOKENS,
    continuation_tokens,
    load_tokenizer,
    save_tokenizer,
    special_tokens,
    tokenizer_hash,
    train_tokenizer,
)

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Dogs and foxes, foxes and dogs!"] * 5


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def write_vocabulary(path, *pieces, special=SPECIAL_TOKENS):
    path.write_text("".join(f"{token}\n" for token in [*special, *pieces]), encoding="utf-8")
    return path


@pytest.mark.parametrize(("requested", "actual"), [(128, 128), (100, 128), (64, 64)])
def test_the_size_of_a_trained_vocabulary_is_rounded_up_to_a_multiple_of_64(requested, actual):
    tokenizer = train_tokenizer(TEXTS, requested)
    assert tokenizer.get_vocab_size() == actual
    assert sorted(tokenizer.get_vocab().values()) == list(range(actual))


def test_unused_tokens_fill_up_a_vocabulary_larger_than_the_text_yields():
    tokenizer = train_tokenizer(TEXTS, 1024)
    assert tokenizer.get_vocab_size() == 1024
    assert "[unused0]" in tokenizer.get_vocab()
    assert len(ids(tokenizer, "foxes")) == 1


def test_training_is_reproducible_and_independent_of_the_order_of_the_texts():
    hashes = {tokenizer_hash(train_tokenizer(texts, 256)) for texts in (TEXTS, TEXTS, TEXTS[::-1])}
    assert len(hashes) == 1


def test_a_vocabulary_depends_on_the_text_alone_and_not_on_the_process():
    """Every process chooses the same among pieces and characters that are equally frequent."""
    program = (
        "from bertfast.data.tokenizer import tokenizer_hash, train_tokenizer\n"
        "words = [chr(97 + i % 26) + chr(0x3b1 + i % 17) + chr(97 + i * i % 23) for i in range(400)]\n"
        "print(*(tokenizer_hash(train_tokenizer(words, size)) for size in (128, 512)))"
    )
    hashes = set()
    for seed, threads in (("1", "1"), ("2", "3")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        ran = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        hashes.add(ran.stdout)
    assert len(hashes) == 1


def test_words_that_are_too_long_for_the_tokenizer_are_left_out_of_training():
    long = "x" * 100_000  # minutes, if the trainer gets it
    with_long = train_tokenizer([*TEXTS, long, f"{long}。一二," + "三" * 200], 256)
    assert with_long.get_vocab().keys() == train_tokenizer([*TEXTS, "。一二," + "三" * 200], 256).get_vocab().keys()
    assert with_long.encode(long, add_special_tokens=False).tokens == ["[UNK]"]


def test_special_tokens_in_the_training_text_do_not_become_pieces():
    tokenizer = train_tokenizer([*TEXTS, "[MASK] and [SEP] [MASK]"] * 9, 256)
    assert not [t for t in tokenizer.get_vocab() if any(map(str.isupper, t)) and t not in SPECIAL_TOKENS]


def test_only_a_cased_vocabulary_keeps_upper_case():
    cased, uncased = (train_tokenizer(TEXTS, 256, cased=cased) for cased in (True, False))
    assert ids(cased, "The") != ids(cased, "the")
    assert ids(uncased, "The") == ids(uncased, "the")


def test_training_on_empty_texts_is_refused():
    with pytest.raises(ValueError, match="no text to train"):
        train_tokenizer([" ", ""], 256)


def test_ids_of_special_tokens_and_continuations():
    tokenizer = train_tokenizer(TEXTS, 128)
    special = special_tokens(tokenizer)
    assert (special.pad, special.unk, special.cls, special.sep, special.mask) == (0, 1, 2, 3, 4)
    continues = continuation_tokens(tokenizer)
    assert continues.dtype == bool
    assert np.flatnonzero(continues).tolist() == [i for i in range(128) if tokenizer.id_to_token(i).startswith("##")]
    assert 0 < continues.sum() < 128


@pytest.mark.parametrize("cased", [True, False])
def test_saving_and_loading_preserves_the_tokenizer(tmp_path, cased):
    tokenizer = train_tokenizer(TEXTS, 256, cased=cased)
    save_tokenizer(tokenizer, tmp_path)
    paths = (tmp_path, tmp_path / "tokenizer.json", tmp_path / "vocab.txt")
    assert {tokenizer_hash(load_tokenizer(path)) for path in paths} == {tokenizer_hash(tokenizer)}
    (tmp_path / "tokenizer_config.json").unlink()
    assert tokenizer_hash(load_tokenizer(tmp_path / "vocab.txt", cased=cased)) == tokenizer_hash(tokenizer)


def test_the_hash_differs_if_token_ids_differ(tmp_path):
    same = write_vocabulary(tmp_path / "a.txt", "a", "b")
    order = write_vocabulary(tmp_path / "b.txt", "b", "a")
    hashes = {tokenizer_hash(load_tokenizer(*args)) for args in [(same,), (order,)]}
    hashes.add(tokenizer_hash(load_tokenizer(same, cased=True)))
    assert len(hashes) == 3


def test_casing_is_decided_by_argument_then_config_then_vocabulary(tmp_path):
    path = write_vocabulary(tmp_path / "vocab.txt", "Word", "word")
    assert ids(load_tokenizer(path), "Word") == [5]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert ids(load_tokenizer(tmp_path), "Word") == [6]
    assert ids(load_tokenizer(tmp_path, cased=True), "Word") == [5]


def test_truncation_and_padding_of_a_saved_tokenizer_are_disabled(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 256)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    save_tokenizer(tokenizer, tmp_path)
    assert 3 < len(ids(load_tokenizer(tmp_path), TEXTS[0])) < 50


def test_a_vocabulary_without_mask_token_is_refused(tmp_path):
    path = write_vocabulary(tmp_path / "vocab.txt", "a", special=SPECIAL_TOKENS[:4])
    with pytest.raises(ValueError, match=r"no \[MASK\]"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", "[PAD]\na\nb\na\n", "line 4: 'a' is repeated, first on line 2"),
        ("vocab.txt", "[PAD]\n[UNK] [CLS]\n", r"line 2: '\[UNK\] \[CLS\]' is more than one token"),
        ("vocab.txt", "[PAD]\t0\n", "line 1: .* is more than one token"),
        ("vocab.txt", b"\xff\xfe", "is UTF-16"),
        ("vocab.txt", b"a\nb\xe9\n", "line 2: not UTF-8"),
        ("vocab.txt", "", r"no \[PAD\] and no \[UNK\]"),
        ("vocab.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
        ("tokenizer.json", "", "is empty"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Wor', "is cut off or not JSON"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", Tokenizer(models.WordLevel()).to_str(), "holds a WordLevel model"),
        ("tokenizer.json", Tokenizer(models.BPE()).to_str(), r"no \[PAD\] and no \[UNK\]"),
    ],
)
def test_files_that_are_not_a_tokenizer_are_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as raised:
        load_tokenizer(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("change", ["mark", "windows", "old mac", "blank lines"])
def test_a_vocabulary_of_other_editors_is_read(tmp_path, change):
    plain = "".join(f"{token}\n" for token in [*SPECIAL_TOKENS, "é", "\u2028", "##a"])
    text = {"windows": plain.replace("\n", "\r\n"), "old mac": plain.replace("\n", "\r"), "blank lines": plain + "\n\n"}
    content = text.get(change, plain).encode("utf-8-sig" if change == "mark" else "utf-8")
    (tmp_path / "vocab.txt").write_bytes(content)
    vocabulary = load_tokenizer(tmp_path).get_vocab()
    assert sorted(vocabulary, key=vocabulary.__getitem__) == [*SPECIAL_TOKENS, "é", "\u2028", "##a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "is empty"),
        ('{"do_lower_case": tr', "is cut off or not JSON"),
        (b'{"note": "\xe9"}', "line 1: not UTF-8"),
        ('{"do_lower_case": "yes"}', 'do_lower_case must be true or false, got "yes"'),
    ],
)
def test_damaged_options_are_refused_by_name(tmp_path, options, message):
    save_tokenizer(train_tokenizer(TEXTS, 128), tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(options if isinstance(options, bytes) else options.encode())
    with pytest.raises(ValueError, match=message) as raised:
        load_tokenizer(tmp_path)
    assert str(path) in str(raised.value)


def test_a_null_option_has_its_default(tmp_path):
    save_tokenizer(train_tokenizer(TEXTS, 128), tmp_path)
    options = {"do_lower_case": None, "strip_accents": None, "tokenize_chinese_chars": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    assert load_tokenizer(tmp_path).normalizer.lowercase


def test_files_of_a_tokenizer_are_read_as_utf8_in_every_locale(tmp_path):
    tokenizer = train_tokenizer(["été à Zürich, déjà vu"] * 5, 128, cased=True)
    save_tokenizer(tokenizer, tmp_path)
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        content = (
            (tmp_path / name).read_text(encoding="utf-8").replace('"tokenizer_class"', '"note": "é", "tokenizer_class"')
        )
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    program = (
        "import sys; from bertfast.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_hash\n"
        "tokenizers = [load_tokenizer(f'{sys.argv[1]}/{name}') for name in ('', 'vocab.txt')]\n"
        "save_tokenizer(tokenizers[0], sys.argv[1] + '/again')\n"
        "print(*{tokenizer_hash(tokenizer) for tokenizer in [*tokenizers, load_tokenizer(sys.argv[1] + '/again')]})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr == ""
    assert ran.stdout.split() == [tokenizer_hash(tokenizer)]


def test_a_missing_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a tokenizer\.json nor a vocab\.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        load_tokenizer(tmp_path / "absent.txt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-base-cased"])
def test_token_ids_equal_those_of_transformers(shared_data, tmp_path, name):
    tokenizer = load_tokenizer(shared_data / "vocab" / f"{name}-vocab.txt")
    save_tokenizer(tokenizer, tmp_path)
    hf = transformers.BertTokenizer.from_pretrained(tmp_path)
    original = transformers.BertTokenizer(
        str(shared_data / "vocab" / f"{name}-vocab.txt"), do_lower_case=name.endswith("uncased")
    )
    with lzma.open(shared_data / "corpus" / "wikipedia-train-00.txt.xz", "rt", encoding="utf-8") as file:
        lines = [next(file).strip()[:300] for _ in range(10_000)]
    expected = [encoding.ids for encoding in tokenizer.encode_batch_fast(lines, add_special_tokens=False)]
    assert hf(lines, add_special_tokens=False)["input_ids"] == expected
    assert original(lines, add_special_tokens=False)["input_ids"] == expected
    assert special_tokens(tokenizer).mask == hf.mask_token_id
    assert hf("one", "two")["input_ids"] == tokenizer.encode("one", "two").ids
