"""A load generator for an HTTP server on this machine: requests at random times, or a number of them at a time.

A request is sent at its time even if earlier ones have no answer yet (open loop), so that a slow server does not get
fewer requests than a fast one.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Answers(NamedTuple):
    """What a server did with some requests.

    Attributes:
        latencies: Seconds from sending a request to the end of its answer, in the order of the requests.
        seconds: From the first request to the last answer.
        late: Seconds by which the generator sent requests too late, in the same order.
    """

    latencies: list[float]
    seconds: float
    late: list[float]


def poisson_arrivals(rate: float, count: int, seed: Sequence[int]) -> list[float]:
    """Return the times of `count` requests in seconds, at random with a mean of `rate` per second."""
    arrivals: list[float] = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()
    return arrivals


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the smallest sample that at least `share` of the samples do not exceed."""
    # The small number keeps 0.07 * 100 = 7.000000000000001 from the eighth sample.
    return sorted(samples)[max(math.ceil(share * len(samples) - 1e-9), 1) - 1]


class Client:
    """Sends requests over connections that it keeps open; a new one is made if all wait for answers.

    Args:
        port: Port of the server on this machine.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self._idle: list[Connection] = []

    async def post(self, path: str, body: bytes) -> bytes:
        """Return the answer to a request; RuntimeError if its status is not 200."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if length is None:
            raise RuntimeError(f"the server's answer has no length: {head.decode()}")
        content = await reader.readexactly(int(length[1]))
        self._idle.append((reader, writer))
        if not head.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"the server refused {body[:80]!r}: {content.decode()}")
        return content

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Close the connections at the end, as those of one event loop cannot be used in another."""
        try:
            yield
        finally:
            for _, writer in self._idle:
                writer.close()
            self._idle.clear()


def post(port: int, path: str, body: bytes) -> bytes:
    """Return the answer to one request."""

    async def run() -> bytes:
        client = Client(port)
        with client.connected():
            return await client.post(path, body)

    return asyncio.run(run())


def send_at(port: int, path: str, arrivals: Sequence[float], bodies: Sequence[bytes]) -> Answers:
    """Send requests at their times in seconds from now."""

    async def run() -> Answers:
        client, clock = Client(port), asyncio.get_running_loop().time
        started = clock()

        async def request(at: float, body: bytes) -> tuple[float, float]:
            await asyncio.sleep(started + at - clock())
            sent = clock()
            await client.post(path, body)
            return clock() - sent, sent - started - at

        with client.connected():
            timed = await asyncio.gather(*map(request, arrivals, bodies))
        latencies, late = ([*column] for column in zip(*timed, strict=True))
        return Answers(latencies, clock() - started - arrivals[0], late)

    return asyncio.run(run())


def send_all(port: int, path: str, bodies: Sequence[bytes], at_once: int) -> float:
    """Return the seconds of requests of which `at_once` are always under way, until none is left."""

    async def run() -> float:
        client, clock, left = Client(port), asyncio.get_running_loop().time, iter(bodies)

        async def one_after_another() -> None:
            for body in left:
                await client.post(path, body)

        started = clock()
        with client.connected():
            await asyncio.gather(*(one_after_another() for _ in range(at_once)))
            return clock() - started

    return asyncio.run(run())
