"""Measure the latency of examples/serve.py under load, with bertfast and with OpenVINO as its engine.

    python -m bench.end_to_end.serving MODEL DATA [--repeats N] [--seconds S] [--results FOLDER]

MODEL is the folder of a BERT whose sentence vectors are means of tokens, such as all-MiniLM-L6-v2; DATA contains
glue/SST-2/train.tsv.gz. Each engine has the same server in a process of its own, which joins waiting sentences into
batches, and OpenVINO's are padded. First, vectors are compared with those of transformers. Then each engine gets the
budget of tokens per batch, of BUDGETS, with which it answers most sentences per second when AT_ONCE wait at any time;
with a budget of one token it computes each sentence alone. Last, the engines take turns: they answer BURST sentences,
AT_ONCE at a time, and requests of one sentence at random times (Poisson), at rates that are shares of the throughput
of the slowest engine. The load generator runs on the same cores. Without a server, Python threads, each with one
thread of PyTorch, share one model of bertfast: as many as there are cores, and one.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

import bertfast
from bench.arguments import at_least_one, model_parser
from bench.end_to_end.inference import require_runtimes, wrong_outputs
from bench.end_to_end.load import percentile, poisson_arrivals, post, send_all, send_at
from bench.end_to_end.runtimes import Precision, Predict, Weights, padded, require_bf16, with_openvino
from bench.harness import reason_of
from bench.points import importing_bench
from bench.result_files import ROOT, require_clean_tree, write_result
from bertfast.cli.doctor import package_version
from bertfast.models.files import read_config
from bertfast.tasks.tables import read_table

ENGINES: dict[str, Precision] = {
    "bertfast": "fp32",
    "OpenVINO": "fp32",
    "bertfast, bf16": "bf16",
    "OpenVINO, bf16": "bf16",
    "bertfast, int8": "int8",
}
BUDGETS = (1, 256, 4096)  # tokens per batch
SHARES = (0.3, 0.6, 0.9)  # of the throughput of the slowest engine
AT_ONCE = 32  # sentences under way in a burst
BURST = 128  # sentences
COMPARED = 64  # sentences whose vectors are compared
CALIBRATION = 32  # sentences

SHARED_BY_THREADS = ("bertfast", "bertfast, bf16", "bertfast, int8")

Engine = Callable[[Sequence[list[int]]], np.ndarray]


class Server(NamedTuple):
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors of texts, fp32 [texts, size]."""
        return torch.tensor(json.loads(post(self.port, "/embed", body_of(*texts)))["vectors"])

    def set_budget(self, tokens: int) -> None:
        """Set the tokens per batch."""
        post(self.port, "/budget", str(tokens).encode())

    def batches(self) -> int:
        """Return the number of batches until now."""
        return int(post(self.port, "/batches", b""))


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--repeats", type=at_least_one, default=5, help="rounds of which the median is taken")
    parser.add_argument("--seconds", type=float, default=2.5, help="seconds per engine, rate and round")
    parser.add_argument("--engine", choices=ENGINES, help="only serve with one engine, until standard input ends")
    parser.add_argument("--prepared", type=Path, help="folder of the models that were prepared for --engine")
    arguments = parser.parse_args()
    if arguments.engine:
        serve_until_told(arguments.engine, arguments.model, arguments.prepared)
        return
    require_clean_tree(arguments.results)
    require_runtimes(arguments.results)
    write_result("serving", measure(arguments), arguments.results)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all measurements."""
    texts = read_table(arguments.data / "glue" / "SST-2" / "train.tsv.gz").columns["sentence"]
    result: dict[str, Any] = {"model": "MiniLM", "precisions": ENGINES, "not_run": {}, "errors": {}}
    result["server"] = {name: package_version(name) for name in ("starlette", "uvicorn")}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        expected = prepare(arguments.model, texts, Path(folder))
        servers: dict[str, Server] = {}
        for name, precision in ENGINES.items():
            try:
                server = stack.enter_context(started(name, arguments.model, Path(folder)))
                result["errors"][name] = error_of(server.vectors(texts[:COMPARED]), expected)
            except RuntimeError as error:
                result["not_run"][name] = reason_of(error).removeprefix("RuntimeError: ")
                print(f"{name} did not run: {error}", file=sys.stderr, flush=True)
                continue
            if reason := wrong_outputs(precision, result["errors"][name]):
                raise SystemExit(f"{name}: {reason.replace('hidden states', 'vectors')}, so nothing is timed")
            servers[name] = server
        chosen = {name: best_budget(server, texts) for name, server in servers.items()}
        for name, (budget, rate) in chosen.items():
            servers[name].set_budget(budget)
            print(f"{name}: {rate:.0f} sentences/s with at most {budget} tokens per batch", flush=True)
        result["tokens_per_batch"] = {name: budget for name, (budget, _) in chosen.items()}
        result |= take_turns(servers, texts, rates_of([rate for _, rate in chosen.values()]), arguments)
        engines = {
            name: engine_of(name, arguments.model, Path(folder)) for name in servers if name in SHARED_BY_THREADS
        }
        token_ids = AutoTokenizer.from_pretrained(arguments.model)(texts[:BURST])["input_ids"]
        return result | {"python_threads": by_threads(engines, token_ids, arguments.repeats)}


def rates_of(throughputs: Sequence[float]) -> list[float]:
    """Return the requests per second of the loads, two significant digits each, from the engines' throughputs."""
    return [float(f"{share * min(throughputs):.2g}") for share in SHARES]


def take_turns(
    servers: dict[str, Server], texts: Sequence[str], rates: Sequence[float], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the seconds of bursts, and by rate the latencies in each round."""
    bursts: dict[str, list[float]] = {name: [] for name in servers}
    loads: dict[str, dict[str, list[dict[str, float]]]] = {
        f"{rate:g}": {name: [] for name in servers} for rate in rates
    }
    for number in range(arguments.repeats):
        bodies = [body_of(text) for text in texts[number * BURST :][:BURST]]
        for name, server in servers.items():
            bursts[name].append(send_all(server.port, "/embed", bodies, AT_ONCE))
        for rate in rates:
            for name, server in servers.items():
                found = under_load(server, texts, rate, arguments.seconds, number)
                loads[f"{rate:g}"][name].append(found)
                figures = f"p50 {found['p50_s'] * 1e3:.1f} ms, p99 {found['p99_s'] * 1e3:.1f} ms"
                print(f"round {number + 1}, {rate:g} requests/s, {name}: {figures}", flush=True)
    bursts_of = {"sentences": len(bodies), "at_once": AT_ONCE, "seconds": bursts}
    return {"seconds": arguments.seconds, "burst": bursts_of, "loads": loads}


def under_load(server: Server, texts: Sequence[str], rate: float, seconds: float, number: int) -> dict[str, float]:
    """Return figures of requests of one sentence at random times, the same for all engines in a round."""
    count = max(round(rate * seconds), 1)
    chosen = np.random.default_rng([number, 1]).integers(len(texts), size=count)
    before = server.batches()
    arrivals = poisson_arrivals(rate, count, [number, 0])
    answers = send_at(server.port, "/embed", arrivals, [body_of(texts[index]) for index in chosen])
    return {
        "p50_s": percentile(answers.latencies, 0.5),
        "p99_s": percentile(answers.latencies, 0.99),
        "requests": count,
        "requests_per_s": count / answers.seconds,
        "sentences_per_batch": count / (server.batches() - before),
        "sent_late_p99_s": percentile(answers.late, 0.99),
    }


def by_threads(engines: dict[str, Engine], texts: Sequence[list[int]], repeats: int) -> dict[str, Any]:
    """Return the seconds of sentences computed one by one, by one Python thread and by as many as PyTorch has."""
    cores = torch.get_num_threads()
    seconds: dict[str, dict[str, list[float]]] = {name: {"one": [], "all": []} for name in engines}
    torch.set_num_threads(1)
    try:
        for _ in range(repeats):
            for name, engine in engines.items():
                engine(texts[:1])  # untimed
                seconds[name]["one"].append(seconds_in_threads(engine, texts, 1))
                seconds[name]["all"].append(seconds_in_threads(engine, texts, cores))
    finally:
        torch.set_num_threads(cores)
    return {"sentences": len(texts), "threads": cores, "seconds": seconds}


def seconds_in_threads(engine: Engine, texts: Sequence[list[int]], threads: int) -> float:
    """Return the seconds in which Python threads compute sentences, each the next one that is left."""
    left, all_ready = iter(texts), Barrier(threads + 1)

    def work() -> None:
        all_ready.wait()
        for text in left:  # the iterator of a list is safe to share
            engine([text])

    with ThreadPoolExecutor(threads) as pool:
        ends = [pool.submit(work) for _ in range(threads)]
        all_ready.wait()
        started = time.perf_counter()
        for end in ends:
            end.result()
        return time.perf_counter() - started


def best_budget(server: Server, texts: Sequence[str]) -> tuple[int, float]:
    """Return the tokens per batch with which a server is fastest, and its sentences per second."""
    bodies = [body_of(text) for text in texts[-BURST:]]
    found = []
    for budget in BUDGETS:
        server.set_budget(budget)
        send_all(server.port, "/embed", bodies[:AT_ONCE], AT_ONCE)  # untimed
        found.append((len(bodies) / send_all(server.port, "/embed", bodies, AT_ONCE), budget))
    rate, budget = max(found)
    return budget, rate


def body_of(*texts: str) -> bytes:
    """Return the body of a request."""
    return json.dumps({"texts": texts}).encode()


def prepare(model: Path, texts: Sequence[str], folder: Path) -> Tensor:
    """Write an int8 model and an ONNX file into `folder`, and return the vectors of transformers to compare with."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    batch = dict(tokenizer(texts[:CALIBRATION], padding=True, return_tensors="pt"))
    quantised = bertfast.AutoModel.from_pretrained(model)
    bertfast.quantize(quantised, [batch])
    quantised.save_pretrained(folder / "int8")
    weights = weights_of(model, folder)
    print(f"exported {weights.onnx.name}", flush=True)
    with torch.no_grad():
        compute = with_padding(lambda inputs: weights.reference(**inputs)[0])
        return torch.from_numpy(compute(tokenizer(texts[:COMPARED])["input_ids"]))


def weights_of(model: Path, folder: Path) -> Weights:
    """Return the weights of a model, whose ONNX file is in `folder`."""
    return Weights(read_config(model), [padded([[0] * 8] * 2)], folder, model)


def error_of(vectors: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the largest difference relative to the largest value, and the mean cosine."""
    relative = (vectors - expected).abs().max() / expected.abs().max()
    return {"relative": relative.item(), "cosine": torch.cosine_similarity(vectors, expected).mean().item()}


@contextmanager
def started(name: str, model: Path, folder: Path) -> Iterator[Server]:
    """Start the server of an engine; RuntimeError with the last line that it wrote if it does not start."""
    command = [sys.executable, "-m", "bench.end_to_end.serving", str(model), "-", "--engine", name]
    command += ["--prepared", str(folder)]
    log, pipe = folder / f"{name}.log", subprocess.PIPE
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=importing_bench())
    try:
        assert process.stdout is not None
        if not (line := process.stdout.readline()):
            process.wait()
            raise RuntimeError(next(filter(None, reversed(log.read_text().splitlines())), "it ended without a message"))
        yield Server(process, int(line))
    finally:
        process.communicate()  # the end of its standard input ends it


def serve_until_told(name: str, model: Path, prepared: Path) -> None:
    """Serve with an engine on a free port, which is printed, until standard input ends."""
    serve = example()
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    tokenizer = AutoTokenizer.from_pretrained(model)
    engine = engine_of(name, model, prepared)
    limits = serve.Limits(waiting_texts=1 << 20)  # no request is refused, as that would end the measurement
    server = serve.application(lambda texts: tokenizer(texts, verbose=False)["input_ids"], engine, limits)
    batcher = server.state.batcher

    async def set_budget(request: Request) -> PlainTextResponse:
        batcher.limits = dataclasses.replace(batcher.limits, tokens_per_batch=int(await request.body()))
        return PlainTextResponse("")

    async def batches(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(batcher.batches))

    server.routes.extend([Route("/budget", set_budget, methods=["POST"]), Route("/batches", batches, methods=["POST"])])
    with serve.running(server) as url:
        print(url.rpartition(":")[2], flush=True)
        sys.stdin.read()


def engine_of(name: str, model: Path, prepared: Path) -> Engine:
    """Return the function that computes the vectors of a batch; NotImplementedError if this processor cannot."""
    precision = ENGINES[name]
    if name.startswith("OpenVINO"):
        return with_padding(with_openvino(weights_of(model, prepared), precision))
    if precision == "bf16":
        require_bf16()
    source = (prepared / "int8", None) if precision == "int8" else (model, precision)
    engine: Engine = example().BertfastEngine(*source)
    return engine


def example() -> ModuleType:
    """Return the module examples/serve.py, which imports another one of its folder."""
    if (folder := str(ROOT / "examples")) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("serve")


def with_padding(predict: Predict) -> Engine:
    """Return an engine that pads each batch to its longest sentence, for a function that returns hidden states."""

    def vectors(texts: Sequence[list[int]]) -> np.ndarray:
        inputs = padded(texts)
        mask = inputs["attention_mask"].float()
        means = torch.einsum("slh,sl->sh", predict(inputs).float(), mask / mask.sum(1, keepdim=True))
        return np.asarray(torch.nn.functional.normalize(means))

    return vectors


if __name__ == "__main__":
    main()
