"""`bertfast prepare`: the shards do not depend on processes and parts, and finished work is kept."""

import io
import json
import os
import sys
import threading

import numpy as np
import pytest

from bertfast.data import parts
from bertfast.data import prepare as preparation
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.sentences import split_sentences
from bertfast.data.shards import Shards
from bertfast.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

WORDS = "one two three four five six seven eight nine ten".split()  # noqa: SIM905


def make_documents(seed, count):
    generator = np.random.default_rng(seed)

    def sentence():
        return " ".join(generator.choice(WORDS, generator.integers(3, 9))).capitalize() + "."

    def paragraph():
        return " ".join(sentence() for _ in range(generator.integers(1, 5)))

    return [[f"Document {seed} {i}", *(paragraph() for _ in range(generator.integers(1, 4)))] for i in range(count)]


@pytest.fixture
def texts(tmp_path):
    """A folder with three files of 40 documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for seed in range(3):
        documents = make_documents(seed, 40)
        (folder / f"{seed}.txt").write_text("\n\n".join("\n".join(document) for document in documents))
    return folder


@pytest.fixture
def vocabulary(tmp_path):
    """A folder with a tokenizer whose vocabulary has 256 tokens."""
    lines = (line for seed in range(3) for document in make_documents(seed, 40) for line in document)
    save_tokenizer(train_tokenizer(lines, 256), tmp_path / "vocabulary")
    return str(tmp_path / "vocabulary")


@pytest.fixture
def run(tmp_path):
    """Return a function that prepares into tmp_path/NAME, by default with one process."""

    def run(name, *train, part=None, merge=False, overwrite=False, **corpus):
        corpus = CorpusSettings(train_file=[str(path) for path in train], **({"processes": 1} | corpus))
        return prepare(PrepareSettings(str(tmp_path / name), corpus, part, merge, overwrite))

    return run


def read(folder, split):
    """Return the documents of a split as lists of sentences."""
    tokenizer, shards = load_tokenizer(folder), Shards.open(folder / split)
    shards.verify()
    return [
        [
            tokenizer.decode(part.tokens[part.sentence_starts[s] : part.sentence_starts[s + 1]])
            for s in range(part.document_starts[d], part.document_starts[d + 1])
        ]
        for part in shards.parts
        for d in range(len(part.document_starts) - 1)
    ]


def content(folder):
    """Return the bytes of every file of the shards by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for split in preparation.SPLITS
        for path in sorted((folder / split).rglob("*"))
        if path.is_file()
    }


def modified(folder):
    """Return when the parts were written, by split and name, wherever in the folder they are."""
    return {path.parts[-3:-1]: path.stat().st_mtime_ns for path in folder.rglob("part.json")}


def test_every_sentence_is_in_exactly_one_split(texts, vocabulary, run):
    folder = run("out", texts, tokenizer_name=vocabulary, validation_split_percentage=20)
    train, validation = read(folder, "train"), read(folder, "validation")
    expected = [
        [sentence.lower() for paragraph in document for sentence in split_sentences(paragraph)]
        for seed in range(3)
        for document in make_documents(seed, 40)
    ]
    assert sorted(train + validation) == sorted(expected)
    assert 10 <= len(validation) <= 40
    kept = [document for document in expected if document not in validation]
    assert train == kept


def test_the_name_of_a_text_need_not_be_utf_8(texts, vocabulary, run):
    (texts / "0.txt").rename(texts / os.fsdecode(b"\xff.txt"))
    folder = run("out", texts, tokenizer_name=vocabulary, validation_split_percentage=20)
    assert len(read(folder, "train")) + len(read(folder, "validation")) == 120


def test_shards_do_not_depend_on_processes_and_parts(texts, vocabulary, run):
    alone = run("alone", texts, tokenizer_name=vocabulary)
    together = run("together", texts, tokenizer_name=vocabulary, processes=2)
    for part in ("2/2", "1/2"):
        parts = run("parts", texts, tokenizer_name=vocabulary, part=part)
        assert not (parts / "train" / "manifest.json").exists()
        if part == "2/2":
            with pytest.raises(ValueError, match=r"\d of 3 files are not finished, such as .*txt"):
                run("parts", texts, tokenizer_name=vocabulary, merge=True)
    finished = modified(parts)
    assert len(finished) == 6
    run("parts", texts, tokenizer_name=vocabulary, merge=True)
    assert modified(parts) == finished
    assert content(alone) == content(together) == content(parts)


def test_only_changed_files_are_processed_again(texts, vocabulary, run):
    folder = run("out", texts, tokenizer_name=vocabulary)
    before = modified(folder)
    run("out", texts, tokenizer_name=vocabulary)
    assert modified(folder) == before

    (texts / "1.txt").write_text("Another text. It has two sentences.")
    run("out", texts, tokenizer_name=vocabulary, overwrite=True)
    again = {name[:5] for (split, name), time in modified(folder).items() if time != before[split, name]}
    assert again == {"1.txt"}

    save_tokenizer(train_tokenizer(WORDS, 128), vocabulary)
    run("out", texts, tokenizer_name=vocabulary, overwrite=True)
    assert not [path for path, time in modified(folder).items() if time == before[path]]


@pytest.mark.parametrize("changed", ["--train-file", "--tokenizer-name", "--validation-split-percentage"])
def test_a_folder_of_another_corpus_is_refused(changed, texts, vocabulary, run):
    folder = run("out", texts, tokenizer_name=vocabulary)
    before = content(folder), (folder / "vocab.txt").read_bytes()
    options = {}
    if changed == "--train-file":
        (texts / "1.txt").write_text("Another text.")
    elif changed == "--tokenizer-name":
        save_tokenizer(train_tokenizer(WORDS, 128), vocabulary)
    else:
        options["validation_split_percentage"] = 50
    with pytest.raises(ValueError, match=f"{changed} was .* and is .*--overwrite-output-dir"):
        run("out", texts, tokenizer_name=vocabulary, **options)
    assert (content(folder), (folder / "vocab.txt").read_bytes()) == before


def test_an_interrupted_run_continues(texts, vocabulary, run, monkeypatch):
    whole = run("whole", texts, tokenizer_name=vocabulary)

    def interrupted(source, *rest, original=parts.prepare_file):
        if source.path.name == "1.txt":
            raise KeyboardInterrupt
        original(source, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "prepare_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("out", texts, tokenizer_name=vocabulary)
    folder = texts.parent / "out"
    before = modified(folder)
    assert len(before) == 2
    run("out", texts, tokenizer_name=vocabulary)
    assert before.items() <= modified(folder).items()
    assert content(folder) == content(whole)


@pytest.mark.parametrize("file", ["tokens.bin", "part.json"])
def test_a_part_that_was_cut_off_is_written_again(file, texts, vocabulary, run, caplog):
    folder = run("out", texts, tokenizer_name=vocabulary)
    before = content(folder)
    [damaged] = (folder / "train").glob(f"1.txt-*/{file}")
    damaged.write_bytes(damaged.read_bytes()[:-2])
    run("out", texts, tokenizer_name=vocabulary)
    assert content(folder) == before
    assert f"{damaged.parent} is damaged and is written again" in caplog.text


def test_a_vocabulary_of_an_interrupted_run_is_not_used_for_another_one(texts, run, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts, "prepare_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("out", texts, vocab_size=128)
    before = modified(texts.parent / "out")
    with pytest.raises(ValueError, match="--vocab-size was 128 and is 192"):
        run("out", texts, vocab_size=192)
    assert modified(texts.parent / "out") == before
    folder = run("out", texts, vocab_size=192, overwrite=True)
    assert load_tokenizer(folder).get_vocab_size() == 192


def test_validation_files_replace_the_held_out_documents(texts, vocabulary, run):
    folder = run("out", texts / "0.txt", validation_file=[str(texts / "2.txt")], tokenizer_name=vocabulary)
    assert {document[0].split()[1] for document in read(folder, "train")} == {"0"}
    assert {document[0].split()[1] for document in read(folder, "validation")} == {"2"}
    assert Shards.open(folder / "train").documents == Shards.open(folder / "validation").documents == 40
    with pytest.raises(ValueError, match=r"2\.txt is both in --train-file and in --validation-file"):
        run("out", texts, validation_file=[str(texts / "2.txt")], tokenizer_name=vocabulary)


def test_a_vocabulary_is_trained_once_if_no_tokenizer_is_given(texts, vocabulary, run, monkeypatch):
    folder = run("out", texts, vocab_size=200)
    shards = Shards.open(folder / "train")
    assert shards.vocab_size == load_tokenizer(folder).get_vocab_size() == 256
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "train_tokenizer", None)
        run("out", texts, vocab_size=200)
    run("out", texts, tokenizer_name=vocabulary, overwrite=True)
    run("out", texts, vocab_size=100, overwrite=True)
    assert Shards.open(folder / "train").vocab_size == 128
    run("out", texts, tokenizer_name=vocabulary, overwrite=True)
    run("out", texts, vocab_size=100, overwrite=True)
    assert Shards.open(folder / "train").vocab_size == 128
    run("out", texts, vocab_size=200, cased=True, overwrite=True)
    assert Shards.open(folder / "train").tokenizer_hash != shards.tokenizer_hash


def test_special_tokens_in_the_text_are_tokenized_as_text(tmp_path, vocabulary, run):
    (tmp_path / "a.txt").write_text("one [MASK] two [SEP] three\n")
    folder = run("out", tmp_path / "a.txt", tokenizer_name=vocabulary, validation_split_percentage=0)
    [part] = Shards.open(folder / "train").parts
    tokenizer = load_tokenizer(folder)
    assert not {tokenizer.token_to_id("[MASK]"), tokenizer.token_to_id("[SEP]")} & set(part.tokens.tolist())
    assert Shards.open(folder / "validation").parts == []


def test_standard_input_and_a_pipe_give_the_same_shards_as_a_file(texts, vocabulary, run, monkeypatch):
    text = (texts / "0.txt").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    expected = read(run("given", texts / "0.txt", tokenizer_name=vocabulary), "train")
    assert read(run("piped", "-", tokenizer_name=vocabulary), "train") == expected
    os.mkfifo(pipe := texts.parent / "pipe")
    writer = threading.Thread(target=pipe.write_bytes, args=(text,))
    writer.start()
    assert read(run("named", pipe, tokenizer_name=vocabulary), "train") == expected
    writer.join()
    with pytest.raises(ValueError, match=r"several texts that can be read only once, -, .*pipe: give one"):
        run("both", "-", pipe, tokenizer_name=vocabulary)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("Other text.\n" * 9, {}, "--train-file was .* and is .*--overwrite-output-dir"),
        ("", {"overwrite": True}, "there is no text in standard input"),
        ("A text.\n\ud800\n", {"overwrite": True}, "^standard input, line 2: not UTF-8"),
        ("Other text.\n" * 9, {"overwrite": True, "tokenizer_name": "absent"}, "absent"),
        ("a", {"overwrite": True}, "the text has 1 sentence"),
    ],
)
def test_the_copy_of_standard_input_is_replaced_only_after_all_checks(
    text, options, message, texts, vocabulary, run, monkeypatch
):
    def pipe(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    pipe((texts / "0.txt").read_bytes())
    folder = run("out", "-", tokenizer_name=vocabulary)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pipe(text.encode(errors="surrogatepass"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run("out", "-", **{"tokenizer_name": vocabulary} | options)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    pipe(b"Other text.\n" * 9)
    run("out", "-", tokenizer_name=vocabulary, overwrite=True)
    assert (folder / "standard-input.txt").read_bytes() == b"Other text.\n" * 9


def test_docstrings_are_the_default_text(run, monkeypatch):
    def gather(path, processes):
        records = [{"package": "a", "text": "\n".join(document)} for document in make_documents(0, 9)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    monkeypatch.setattr(preparation, "gather_docstrings", gather)
    folder = run("out", vocab_size=128, validation_split_percentage=0)
    assert len(read(folder, "train")) == 9


@pytest.mark.parametrize(
    ("corpus", "part", "message"),
    [
        ({"validation_split_percentage": 100}, None, "--validation-split-percentage must be"),
        ({"validation_split_percentage": -1}, None, "--validation-split-percentage must be"),
        ({"vocab_size": 5}, None, "--vocab-size must be from 64 to"),
        ({"processes": 0}, None, "--processes must be at least 1"),
        ({"tokenizer_name": "t", "train_file": ["f"]}, "0/2", "--part must be i/n"),
        ({"tokenizer_name": "t", "train_file": ["f"]}, "3/2", "--part must be i/n"),
        ({"tokenizer_name": "t", "train_file": ["f"]}, "1", "--part must be i/n"),
        ({"train_file": ["f"]}, "1/2", "--part requires --tokenizer-name and files"),
        ({"tokenizer_name": "t"}, "1/2", "--part requires --tokenizer-name and files"),
        ({"tokenizer_name": "t", "train_file": ["-"]}, "1/2", "--part requires --tokenizer-name and files"),
    ],
)
def test_invalid_settings_are_refused(corpus, part, message):
    with pytest.raises(ValueError, match=message):
        PrepareSettings("out", CorpusSettings(**corpus), part)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_invalid_file_is_refused_by_name_and_finished_parts_are_kept(texts, vocabulary, run, processes):
    (texts / "2.txt").write_bytes(b"good line\nbad \xff\n")
    with pytest.raises(ValueError, match=r"2\.txt, line 2: not UTF-8"):
        run("out", texts, tokenizer_name=vocabulary, processes=processes)
    assert not (texts.parent / "out" / "train").exists()
    unfinished = texts.parent / "out" / ".unfinished" / "train"
    kept = {path.name[:5] for path in unfinished.iterdir() if not path.name.startswith(".")}
    # With two processes, one may still be at work when the other fails.
    assert kept == {"0.txt", "1.txt"} if processes == 1 else kept <= {"0.txt", "1.txt"}


def test_an_empty_training_split_is_refused(tmp_path, vocabulary, run):
    (tmp_path / "a.txt").write_text("\x01\n")
    with pytest.raises(ValueError, match="no document is left for training"):
        run("out", tmp_path / "a.txt", tokenizer_name=vocabulary, validation_split_percentage=0)


@pytest.mark.parametrize("tokenizer", ["given", "trained"])
def test_empty_files_among_many_are_left_out_with_a_warning(tokenizer, texts, vocabulary, run, caplog):
    options = {"tokenizer_name": vocabulary} if tokenizer == "given" else {"vocab_size": 256}
    whole = read(run("whole", texts, **options), "train")
    (texts / "3.txt").touch()
    (texts / "4.jsonl").write_text('{"text": " "}\n')
    assert read(run("out", texts, **options), "train") == whole
    assert f"2 of 5 files hold no text and are left out, such as {texts / '3.txt'}" in caplog.text
    for path in sorted(texts.glob("[0-2].txt")):
        path.unlink()
    with pytest.raises(ValueError, match=r"there is no text in .*3\.txt, .*4\.jsonl"):
        run("empty", texts, **options)


@pytest.mark.parametrize("documents", [1, 12])
def test_a_part_of_a_small_corpus_is_held_out_and_a_summary_ends_the_run(documents, tmp_path, run, caplog):
    text = "\n\n".join("\n".join(paragraphs) for paragraphs in make_documents(1, documents))
    (tmp_path / "a.txt").write_text(text)
    with caplog.at_level("INFO"):
        folder = run("out", tmp_path / "a.txt", vocab_size=128)
    train, validation = (Shards.open(folder / split) for split in preparation.SPLITS)
    assert min(train.sentences, validation.sentences) >= 2
    documents = [f"{split.documents} document{'s' * (split.documents != 1)}" for split in (train, validation)]
    assert caplog.messages[-3:] == [
        f"text: {documents[0]}, {train.sentences} sentences, {train.tokens} tokens",
        f"held out for validation: {documents[1]}, {validation.sentences} sentences, {validation.tokens} tokens",
        "vocabulary: 128 tokens",
    ]


def test_plain_text_named_gz_is_read_and_a_file_that_is_not_text_is_named(texts, vocabulary, run):
    (texts / "0.txt").rename(texts / "0.txt.gz")
    assert len(read(run("out", texts, tokenizer_name=vocabulary, validation_split_percentage=0), "train")) == 120
    (texts / "1.txt").write_bytes(b"a line\n\0\1")
    with pytest.raises(ValueError, match=r"1\.txt is not a text file: byte 7 is 0"):
        run("other", texts, tokenizer_name=vocabulary)
