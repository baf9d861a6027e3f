"""examples/serve.py: joined batches give each request its own vectors, and bad requests get a clear error."""

import asyncio
import importlib
import json
import logging
import re
import socket
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import assert_as_accurate_as_torch

import bertfast

pytest.importorskip("starlette", reason="the extra `serve`")
pytest.importorskip("uvicorn", reason="the extra `serve`")

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # whose scripts import each other
serve = importlib.import_module("serve")
tiny_model = importlib.import_module("tiny_model")

TEXTS = ["A short text.", "The second reading of a sample agreed with the first.", "text", "A sample " * 20]


def words(texts):
    """Tokenize by spaces: a text of n words has n tokens, which are their lengths."""
    return [[len(word) for word in text.split()] for text in texts]


def sums(texts):
    """Return the sum of each text's tokens, and their number."""
    return np.array([[sum(ids), len(ids)] for ids in texts], np.float32)


class GatedEngine:
    """Computes `sums` and records the lengths of its batches; the first batch waits for `open`."""

    def __init__(self):
        self.open, self.started, self.batches = threading.Event(), threading.Event(), []

    def __call__(self, texts):
        self.batches.append([len(ids) for ids in texts])
        self.started.set()
        assert self.open.wait(60)
        return sums(texts)


def post(url, content):
    """Return the status, content and headers of the answer to a request."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    try:
        with urllib.request.urlopen(f"{url}/embed", body, timeout=60) as answer:
            return answer.status, json.load(answer), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def vectors_of(url, texts):
    status, content, _ = post(url, {"texts": texts})
    assert status == 200, content
    return np.array(content["vectors"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model.save_tiny_model(tmp_path_factory.mktemp("tiny"), bertfast.BertModel)


@pytest.fixture(scope="module")
def token_ids(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]


def expected_vectors(folder, token_ids, dtype):
    """Return the vectors of transformers, one text at a time."""
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        means = [model(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in token_ids]
    return torch.nn.functional.normalize(torch.stack(means))


def test_the_engine_is_as_accurate_as_transformers(folder, token_ids):
    actual = torch.from_numpy(serve.BertfastEngine(folder)(token_ids))
    truth, expected = (expected_vectors(folder, token_ids, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_accurate_as_torch(actual, expected, truth)


def test_the_engine_takes_quantised_folders_and_bf16(folder, token_ids, tmp_path):
    model = bertfast.AutoModel.from_pretrained(folder)
    bertfast.quantize(model)
    model.save_pretrained(tmp_path)
    expected = expected_vectors(folder, token_ids, torch.float32)
    for engine in (serve.BertfastEngine(str(tmp_path)), serve.BertfastEngine(folder, "bf16")):
        actual = torch.from_numpy(engine(token_ids))
        assert torch.cosine_similarity(actual, expected).min() > 0.999
        assert (actual - expected).abs().max() > 1e-6  # it is not fp32
    with pytest.raises(ValueError, match="this model is quantised to int8: load the model from which"):
        serve.BertfastEngine(str(tmp_path), "bf16")


def test_joined_requests_get_the_vectors_of_single_ones(folder):
    tokenizer, engine = transformers.AutoTokenizer.from_pretrained(folder), serve.BertfastEngine(folder)
    gate, started, sizes = threading.Event(), threading.Event(), []

    def gated(texts):
        sizes.append(len(texts))
        started.set()
        assert gate.wait(60)
        return engine(texts)

    server = serve.application(lambda texts: tokenizer(texts)["input_ids"], gated, serve.Limits())
    with serve.running(server) as url, ThreadPoolExecutor(8) as pool:
        gate.set()
        alone = np.concatenate([vectors_of(url, [text]) for text in TEXTS])
        assert sizes == [1] * len(TEXTS)  # an idle server waits for no other text
        sizes.clear(), gate.clear(), started.clear()
        first = pool.submit(vectors_of, url, ["The first."])
        assert started.wait(60)
        requests = [pool.submit(vectors_of, url, texts) for texts in ([TEXTS[0]], TEXTS[1:3], [TEXTS[3]])]
        wait_until(lambda: len(server.state.batcher._waiting) == len(TEXTS))
        gate.set()
        joined = np.concatenate([request.result() for request in requests])
        assert first.result().shape == (1, alone.shape[1])
    assert sizes == [1, len(TEXTS)]
    np.testing.assert_allclose(joined, alone, atol=1e-6)
    assert np.abs(joined[:, None] - joined[None]).max(-1)[~np.eye(len(TEXTS), dtype=bool)].min() > 1e-3  # all differ
    np.testing.assert_allclose(np.linalg.norm(joined, axis=1), 1, atol=1e-6)


def wait_until(condition):
    """Wait for the event loop of another thread."""
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise TimeoutError


@pytest.mark.parametrize(
    ("lengths", "batches"),
    [
        ([4, 4, 4, 20, 1], [[4, 4], [4], [20], [1]]),  # 20 exceeds the budget: alone
        ([10, 10], [[10], [10]]),
        ([9, 1, 1], [[9, 1], [1]]),
        ([3], [[3]]),
    ],
)
def test_a_batch_has_at_most_the_budget_of_tokens_in_order_of_arrival(lengths, batches):
    engine = GatedEngine()
    batcher = serve.Batcher(engine, serve.Limits(tokens_per_batch=10))

    async def run():
        first = asyncio.create_task(batcher.embed([[7]]))
        await asyncio.to_thread(engine.started.wait, 60)
        requests = [asyncio.create_task(batcher.embed([[1] * length])) for length in lengths]
        await asyncio.sleep(0)  # so that all wait
        engine.open.set()
        return await asyncio.gather(first, *requests)

    results = asyncio.run(run())
    assert engine.batches == [[1], *batches]
    assert [result.tolist() for result in results] == [[[7, 1]], *([[length, length]] for length in lengths)]


def test_a_request_larger_than_the_budget_is_split():
    engine = GatedEngine()
    engine.open.set()
    batcher = serve.Batcher(engine, serve.Limits(tokens_per_batch=10))
    result = asyncio.run(batcher.embed([[2] * length for length in (6, 6, 4)]))
    assert engine.batches == [[6], [6, 4]]
    assert result[:, 1].tolist() == [6, 6, 4]


def test_a_cancelled_request_leaves_others_alone():
    engine = GatedEngine()
    batcher = serve.Batcher(engine, serve.Limits())

    async def run():
        first, second = (asyncio.create_task(batcher.embed([[n]])) for n in (1, 2))
        await asyncio.to_thread(engine.started.wait, 60)
        second.cancel()
        await asyncio.sleep(0)
        third = asyncio.create_task(batcher.embed([[3]]))
        await asyncio.sleep(0)
        engine.open.set()
        return (await first).tolist(), (await third).tolist()

    assert asyncio.run(run()) == ([[1, 1]], [[3, 1]])


LIMITS = serve.Limits(tokens_per_text=3, bytes_per_request=200, waiting_texts=20)
TYPE_THIS = 'send {"texts": ["A text."]}'
BAD = {
    "no body": (b"", 400, f"the body is not JSON: {TYPE_THIS}"),
    "no JSON": (b"{texts: 1}", 400, f"the body is not JSON: {TYPE_THIS}"),
    "no UTF-8": (b'{"texts": ["\xff"]}', 400, f"the body is not JSON: {TYPE_THIS}"),
    "nested": (b"[" * 199, 400, f"the body is not JSON: {TYPE_THIS}"),
    "no object": (["a"], 422, f'"texts" is not a list of at least one string: {TYPE_THIS}'),
    "no texts": ({"text": ["a"]}, 422, f'"texts" is not a list of at least one string: {TYPE_THIS}'),
    "a string": ({"texts": "a"}, 422, f'"texts" is not a list of at least one string: {TYPE_THIS}'),
    "an empty list": ({"texts": []}, 422, f'"texts" is not a list of at least one string: {TYPE_THIS}'),
    "a number": ({"texts": ["a", 1]}, 422, "texts[1] is not a string"),
    "null": ({"texts": [None]}, 422, "texts[0] is not a string"),
    "an empty text": ({"texts": ["a", " \n"]}, 422, "texts[1] is empty"),
    "a surrogate": ({"texts": ["\ud800"]}, 422, "texts[0] has half of a surrogate pair, which is no character"),
    "a long text": ({"texts": ["a b c", "a b c d"]}, 413, "texts[1] has 4 tokens: a text has 1 to 3"),
    "many texts": ({"texts": ["a"] * 21}, 413, "a request has at most 20 texts: send fewer"),
    "many bytes": ({"texts": ["a"] * 100}, 413, "a request has at most 200 bytes: send fewer texts"),
}


@pytest.fixture(scope="module")
def small_server():
    with serve.running(serve.application(words, sums, LIMITS)) as url:
        yield url


@pytest.mark.parametrize(("content", "status", "message"), BAD.values(), ids=BAD)
def test_bad_requests_are_refused_and_the_server_goes_on(content, status, message, small_server):
    assert post(small_server, content)[:2] == (status, {"error": message})
    assert vectors_of(small_server, ["ab abc"]).tolist() == [[5, 2]]


@pytest.fixture(scope="module")
def models(folder, tmp_path_factory):
    """Folders of a quantised model, and of a RoBERTa whose tokenizer does not know that it takes 64 tokens."""
    where = tmp_path_factory.mktemp("models")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    quantised = bertfast.AutoModel.from_pretrained(folder)
    bertfast.quantize(quantised)
    quantised.save_pretrained(where / "int8")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.RobertaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=66)
    transformers.RobertaModel(config).save_pretrained(where / "roberta")
    tokenizer.model_max_length = 10**30
    broken = bertfast.AutoModel.from_pretrained(folder)
    broken.encoder.layer[0].output.dense.weight.data[3, 3] = float("nan")
    broken.save_pretrained(where / "nan")
    for name in ("int8", "roberta", "nan"):
        tokenizer.save_pretrained(where / name)
    return where


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["int8", "--precision", "bf16"], "is quantised to int8: load the model from which"),
        (["nowhere/at/all"], "nowhere/at/all: "),
        (["nan"], "nan: the vectors of this model are NaN or infinite: give another model or --precision"),
        (["roberta"], "texts of 66 tokens do not fit into the model .*: give a smaller --max-seq-length"),
        (["roberta", "--max-seq-length", "0"], "--max-seq-length: must be a number from 3 to .*, got 0"),
        (["roberta", "--port", "99999"], "--port: must be a number from 1 to 65535, got 99999"),
    ],
)
def test_bad_arguments_end_the_program_before_it_serves(arguments, message, models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        serve.main()
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/embed", 405), ("/other", 404)])
def test_other_paths_and_methods(path, status, small_server):
    try:
        with urllib.request.urlopen(small_server + path, timeout=60) as answer:
            found = answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        found = error.code, json.load(error)
    assert found[0] == status
    assert found[1]["status"] == "ok" if status == 200 else found[1]["error"]


def test_an_error_of_the_engine_fails_only_its_requests():
    def engine(texts):
        if [4] in texts:
            raise RuntimeError("a planted error")
        return sums(texts)[: -1 if [5] in texts else None]  # one vector too few

    with serve.running(serve.application(words, engine, serve.Limits())) as url:
        for text in ("four", "fives"):
            assert post(url, {"texts": [text]})[:2] == (500, {"error": "an error, which the log shows"})
            assert vectors_of(url, ["ab"]).tolist() == [[2, 1]]


def test_a_full_queue_refuses_and_open_requests_are_answered_at_the_end():
    engine = GatedEngine()
    server = serve.application(words, engine, serve.Limits(waiting_texts=2))
    with ThreadPoolExecutor(2) as pool:
        with serve.running(server) as url:
            first = pool.submit(vectors_of, url, ["a"])
            assert engine.started.wait(60)
            second = pool.submit(vectors_of, url, ["ab", "abc"])
            wait_until(lambda: len(server.state.batcher._waiting) == 2)
            status, content, headers = post(url, {"texts": ["abcd"]})
            assert (status, headers["Retry-After"]) == (503, "1")
            assert content == {"error": "too many texts wait already: send this request again later"}
            threading.Timer(0.5, engine.open.set).start()  # while the server ends
        assert first.result().tolist() == [[1, 1]]
        assert second.result().tolist() == [[2, 1], [3, 1]]
    assert engine.batches == [[1], [1, 1]]


def test_a_client_that_leaves_while_it_sends_is_no_error(small_server, caplog):
    log = logging.getLogger("uvicorn.error")  # which does not propagate
    log.addHandler(caplog.handler)
    try:
        for sent in (b"", b'{"texts": ["a'):
            with socket.create_connection(("127.0.0.1", int(small_server.rpartition(":")[2]))) as client:
                client.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n" + sent)
                threading.Event().wait(0.1)  # so that the server reads the body when the client leaves
        for _ in range(3):
            assert vectors_of(small_server, ["ab"]).tolist() == [[2, 1]]
            threading.Event().wait(0.1)
    finally:
        log.removeHandler(caplog.handler)
    assert not caplog.records


def test_half_precision_weights_are_served_in_fp32(folder, token_ids, tmp_path):
    bertfast.AutoModel.from_pretrained(folder).half().save_pretrained(tmp_path)
    actual = torch.from_numpy(serve.BertfastEngine(str(tmp_path))(token_ids))
    assert (actual - expected_vectors(folder, token_ids, torch.float32)).abs().max() < 1e-2


def test_texts_of_clients_that_left_are_not_computed():
    engine = GatedEngine()
    server = serve.application(words, engine, serve.Limits())
    waiting, body = server.state.batcher._waiting, b'{"texts": ["ab"]}'
    with ThreadPoolExecutor(1) as pool, serve.running(server) as url:
        first = pool.submit(vectors_of, url, ["a"])
        assert engine.started.wait(60)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            wait_until(lambda: len(waiting) == 1)
        wait_until(lambda: waiting[0][1].cancelled())
        engine.open.set()
        assert first.result().tolist() == [[1, 1]]
        assert vectors_of(url, ["abc"]).tolist() == [[3, 1]]
    assert engine.batches == [[1], [1]]
