"""Serve sentence vectors over HTTP: serve.py [FOLDER] [--precision bf16]. Requires `pip install '.[serve]'`.

    curl http://127.0.0.1:8000/embed -d '{"texts": ["A short text."]}'
    {"vectors": [[0.0123, …]]}

A vector is the mean of the hidden states of all tokens, divided by its norm. Texts that arrive while a batch is
computed, also those of other requests, are joined into the next batch, up to a number of tokens; an idle server waits
for nothing. Without FOLDER, the program sends a request to a server of a tiny random model, and ends.
"""

import argparse
import asyncio
import json
import re
import socket
import tempfile
import urllib.request
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tiny_model import save_tiny_model
from transformers import AutoTokenizer

import bertfast

TokenIds = list[int]  # of a text, with [CLS] and [SEP]
Engine = Callable[[Sequence[TokenIds]], np.ndarray]  # returns a vector per text, fp32 [texts, size]


class BertfastEngine:
    """Computes the vectors of a batch without padding, with a model that is frozen, or quantised in its folder."""

    def __init__(self, folder: str, precision: Literal["fp32", "bf16"] | None = None) -> None:
        model = bertfast.AutoModel.from_pretrained(folder).eval()
        self.model = model.float() if model.dtype == torch.float16 else model
        self.collate = bertfast.PaddingFreeCollator()
        if precision or not hasattr(self.model.config, "quantization_config"):
            bertfast.freeze(self.model, precision)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[TokenIds]) -> np.ndarray:
        batch = self.collate([{"input_ids": token_ids} for token_ids in texts])
        hidden = self.model(**batch).last_hidden_state[0].float()  # [tokens, size]
        means = torch.segment_reduce(hidden, "mean", lengths=torch.tensor([len(token_ids) for token_ids in texts]))
        return np.asarray(torch.nn.functional.normalize(means))


@dataclass(frozen=True)
class Limits:
    """What the server accepts, and how many tokens it joins into a batch."""

    tokens_per_batch: int = 4096
    tokens_per_text: int = 512
    bytes_per_request: int = 1 << 20
    waiting_texts: int = 4096


class Batcher:
    """Joins the texts of all requests into batches, which one worker thread computes in order of arrival."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine, self.limits = engine, limits
        self.batches = 0  # that were computed
        self._waiting: deque[tuple[TokenIds, asyncio.Future[np.ndarray]]] = deque()
        self._worker = ThreadPoolExecutor(1, "engine")
        self._computing: asyncio.Task[None] | None = None

    async def embed(self, texts: list[TokenIds]) -> np.ndarray:
        """Return the vectors of the texts of a request, fp32 [texts, size], when they are computed."""
        if len(self._waiting) + len(texts) > self.limits.waiting_texts:
            raise HTTPException(503, "too many texts wait already: send this request again later", {"Retry-After": "1"})
        vectors: list[asyncio.Future[np.ndarray]] = [asyncio.Future() for _ in texts]
        self._waiting.extend(zip(texts, vectors, strict=True))
        if self._computing is None or self._computing.done():
            self._computing = asyncio.create_task(self._compute_waiting())
        return np.stack(await asyncio.gather(*vectors))

    async def _compute_waiting(self) -> None:
        while self._waiting:
            batch = [*self._next_batch()]
            if not batch:
                break
            texts, futures = zip(*batch, strict=True)
            self.batches += 1
            try:
                vectors = await asyncio.get_running_loop().run_in_executor(self._worker, self.engine, texts)
                for future, vector in zip(futures, vectors, strict=True):
                    if not future.done():  # else its client has left
                        future.set_result(vector)
            except Exception as error:  # of the engine: only these requests fail
                for future in futures:
                    if not future.done():
                        future.set_exception(error)

    def _next_batch(self) -> Iterator[tuple[TokenIds, asyncio.Future[np.ndarray]]]:
        """Yield the oldest text that waits, and more that fit into a batch; drop those of clients that left."""
        tokens = 0
        while self._waiting and (tokens == 0 or tokens + len(self._waiting[0][0]) <= self.limits.tokens_per_batch):
            token_ids, vector = self._waiting.popleft()
            if not vector.cancelled():
                tokens += len(token_ids)
                yield token_ids, vector


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, np.ndarray]) -> np.ndarray | None:
    """Return the result of `work`; cancel it, and return None, if the client closes the connection before."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(leaves())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def read_texts(request: Request, limits: Limits) -> list[str]:
    """Return the texts of a request; HTTPException with what is wrong if it is not as it should be."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.bytes_per_request:
            raise HTTPException(413, f"a request has at most {limits.bytes_per_request} bytes: send fewer texts")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, 'the body is not JSON: send {"texts": ["A text."]}') from None
    texts = content.get("texts") if isinstance(content, dict) else None
    if not (isinstance(texts, list) and texts):
        raise HTTPException(422, '"texts" is not a list of at least one string: send {"texts": ["A text."]}')
    if len(texts) > limits.waiting_texts:
        raise HTTPException(413, f"a request has at most {limits.waiting_texts} texts: send fewer")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise HTTPException(422, f"texts[{index}] is {'empty' if isinstance(text, str) else 'not a string'}")
        if re.search("[\ud800-\udfff]", text):
            raise HTTPException(422, f"texts[{index}] has half of a surrogate pair, which is no character")
    return texts


def application(tokenize: Callable[[list[str]], list[TokenIds]], engine: Engine, limits: Limits) -> Starlette:
    """Return the server of an engine; its `state.batcher` is the `Batcher`."""
    batcher = Batcher(engine, limits)

    async def embed(request: Request) -> Response:
        try:
            content = await read_texts(request, limits)
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads
        texts = tokenize(content)  # in the event loop: a tokenizer is not safe to call from several threads
        for index, token_ids in enumerate(texts):
            if not 0 < len(token_ids) <= limits.tokens_per_text:
                message = f"texts[{index}] has {len(token_ids)} tokens: a text has 1 to {limits.tokens_per_text}"
                raise HTTPException(413, message)
        vectors = await unless_client_leaves(request, batcher.embed(texts))
        if vectors is None:
            return Response(status_code=400)
        return JSONResponse({"vectors": vectors.astype(float).round(7).tolist()})

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "batches": batcher.batches})

    async def explain(request: Request, error: Exception) -> JSONResponse:
        known = error if isinstance(error, HTTPException) else HTTPException(500, "an error, which the log shows")
        return JSONResponse({"error": known.detail}, known.status_code, known.headers)

    server = Starlette(exception_handlers={HTTPException: explain, Exception: explain})
    server.routes.extend([Route("/embed", embed, methods=["POST"]), Route("/health", health)])
    server.state.batcher = batcher
    return server


@contextmanager
def running(server: Starlette) -> Iterator[str]:
    """Run a server in a thread, on a free port of this machine, and give its URL; answer open requests at the end."""
    runner = uvicorn.Server(uvicorn.Config(server, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1, "server") as thread:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else the end of an answer waits for 40 ms
        thread.submit(runner.run, [listener])
        try:
            yield "http://{}:{}".format(*listener.getsockname())
        finally:
            runner.should_exit = True


def between(first: int, last: int) -> Callable[[str], int]:
    """Return the type of an argument: a whole number from `first` to `last`."""

    def number(text: str) -> int:
        if not (re.fullmatch("[0-9]{1,9}", text) and first <= int(text) <= last):
            raise argparse.ArgumentTypeError(f"must be a number from {first} to {last}, got {text}")
        return int(text)

    return number


def main() -> None:
    """Run the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="folder or hub id of the model and its tokenizer")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="precision (default: that of the weights)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=between(1, 65535), default=8000, help="port to listen on (default: 8000)")
    tokens = between(3, 1 << 20)
    parser.add_argument("--tokens-per-batch", type=tokens, default=Limits.tokens_per_batch, help="tokens of a batch")
    parser.add_argument("--max-seq-length", type=tokens, default=Limits.tokens_per_text, help="most tokens of a text")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or save_tiny_model(Path(temporary), bertfast.BertModel)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            engine = BertfastEngine(folder, arguments.precision)
        except (OSError, ValueError) as error:  # there is none, or it cannot be frozen: with --precision if quantised
            parser.error(f"{folder}: {' '.join(str(error).split())}")
    longest = min(arguments.max_seq_length, tokenizer.model_max_length, engine.model.config.max_position_embeddings)
    try:  # once, before the first request: positions of RoBERTa's models begin at 2
        if not np.isfinite(engine([[tokenizer.cls_token_id or 0] * longest])).all():
            parser.error(f"{folder}: the vectors of this model are NaN or infinite: give another model or --precision")
    except (IndexError, ValueError) as error:
        parser.error(f"texts of {longest} tokens do not fit into the model ({error}): give a smaller --max-seq-length")
    limits = Limits(arguments.tokens_per_batch, longest)
    server = application(lambda texts: tokenizer(texts, verbose=False)["input_ids"], engine, limits)
    if arguments.folder:
        uvicorn.run(server, host=arguments.host, port=arguments.port, timeout_graceful_shutdown=30)  # seconds
        return
    body = json.dumps({"texts": ["A short text.", "A text that is a little longer."]}).encode()
    with running(server) as url, urllib.request.urlopen(f"{url}/embed", body) as response:
        print(*(len(vector) for vector in json.load(response)["vectors"]))  # the sizes of both vectors: 128 128


if __name__ == "__main__":
    main()
