"""Shards are written completely or not at all; damaged shards and other formats are refused by name."""

import json

import numpy as np
import pytest

from bertfast.data.shards import PartWriter, Shards, part_origin, token_dtype, write_manifest, write_part

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [[11], [12, 13], [14, 15, 16]]]


@pytest.fixture
def folder(tmp_path):
    write_part(tmp_path, "a", DOCUMENTS[:2])
    write_part(tmp_path, "empty", [])
    write_part(tmp_path, "b", DOCUMENTS[2:])
    write_manifest(tmp_path, ["a", "empty", "b"], vocab_size=64, tokenizer_hash="f" * 64)
    return tmp_path


def read_back(shards):
    return [
        [
            part.tokens[part.sentence_starts[s] : part.sentence_starts[s + 1]].tolist()
            for s in range(part.document_starts[d], part.document_starts[d + 1])
        ]
        for part in shards.parts
        for d in range(len(part.document_starts) - 1)
    ]


def test_documents_are_read_as_written(folder):
    shards = Shards.open(folder)
    assert read_back(shards) == DOCUMENTS
    assert (shards.documents, shards.sentences, shards.tokens) == (3, 6, 12)
    assert (shards.vocab_size, shards.tokenizer_hash) == (64, "f" * 64)
    assert shards.parts[0].tokens.dtype == np.uint16
    shards.verify()


def test_empty_sentences_and_documents_are_dropped(tmp_path):
    write_part(tmp_path, "a", [[[], [1, 2], []], [[], []], [], [[3]]])
    write_manifest(tmp_path, ["a"], vocab_size=64, tokenizer_hash="")
    assert read_back(Shards.open(tmp_path)) == [[[1, 2]], [[3]]]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_token_ids_are_stored_in_the_narrowest_dtype(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    write_part(tmp_path, "a", [[[vocab_size - 1]]], token_dtype(vocab_size))
    write_manifest(tmp_path, ["a"], vocab_size=vocab_size, tokenizer_hash="")
    assert read_back(Shards.open(tmp_path)) == [[[vocab_size - 1]]]


def test_an_interrupted_part_leaves_the_previous_one_in_place(tmp_path):
    write_part(tmp_path, "a", DOCUMENTS)

    def documents():
        yield [[1]]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path, "a", documents())
    write_manifest(tmp_path, ["a"], vocab_size=64, tokenizer_hash="")
    assert read_back(Shards.open(tmp_path)) == DOCUMENTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "manifest.json"]


def test_a_part_stores_its_origin(tmp_path):
    with PartWriter(tmp_path, "a", np.uint16, origin={"path": "x"}):
        pass
    assert part_origin(tmp_path, "a") == {"path": "x"}
    assert part_origin(tmp_path, "b") is None
    for damaged in ("{", "[]", "[" * 100_000, "\0"):
        (tmp_path / "a" / "part.json").write_text(damaged)
        assert part_origin(tmp_path, "a") is None


def test_shards_of_another_tokenizer_are_refused(folder):
    Shards.open(folder, "f" * 64)
    with pytest.raises(ValueError, match="another tokenizer"):
        Shards.open(folder, "0" * 64)


def test_a_folder_without_manifest_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no manifest"):
        Shards.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, "\0", '{"format": "bertfast shards 1"}'])
def test_an_invalid_manifest_is_refused_by_name(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest"):
        Shards.open(folder)


@pytest.mark.parametrize("name", ["tokens", "sentence_starts", "document_starts"])
def test_damaged_files_are_refused_by_name(folder, name):
    path = folder / "b" / f"{name}.bin"
    whole = path.read_bytes()

    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match=rf"b/{name}.bin is damaged"):
        Shards.open(folder).verify()

    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"b/{name}.bin is damaged"):
        Shards.open(folder)

    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"b/{name}.bin is missing"):
        Shards.open(folder)


def test_inconsistent_boundaries_are_refused(folder):
    starts = folder / "b" / "sentence_starts.bin"
    starts.write_bytes((np.fromfile(starts, "<i8") + 1).tobytes())
    with pytest.raises(ValueError, match="boundaries"):
        Shards.open(folder)


def test_the_manifest_is_readable_json(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [part["name"] for part in manifest["parts"]] == ["a", "empty", "b"]
    assert manifest["documents"] == 3
