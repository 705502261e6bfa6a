"""Latency and throughput of an OpenAI-compatible endpoint: SGLang, ``llamafactory-cli api``, or any other.

Answers are streamed, so that the time to the first token can be told. Each request begins with a number of its own;
otherwise a server with a prefix cache would answer from it.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import httpx

from ...ground.errors import KTServerError


@dataclass(frozen=True)
class Answer:
    """One request's figures; times in seconds."""

    latency: float
    first_token: float
    """until the first piece of text; as ``latency`` where there was none"""
    tokens: int
    counted: bool
    """the endpoint said how many tokens; else its pieces were counted"""


@dataclass(frozen=True)
class Level:
    """The figures of one concurrency; times in seconds, rates in tokens a second."""

    concurrency: int
    requests: int
    failed: int
    wall: float
    mean: float
    p50: float
    p90: float
    p99: float
    first_token_mean: float
    first_token_p90: float
    tokens: int
    counted: bool
    per_request_rate: float
    """mean over requests of tokens after the first, a second"""
    total_rate: float
    first_error: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None where no request was answered."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


class Endpoint:
    """``URL/v1/chat/completions``.

    Args:
        url: with or without ``/v1``.
        model: the name to send; None for the first that the endpoint lists.
        api_key: sent as a bearer token.
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def measure(
        self,
        prompt: str,
        max_tokens: int,
        requests: int,
        warm_up: int,
        concurrencies: Sequence[int],
        done: Callable[[], object] = lambda: None,
    ) -> list[Level]:
        """Warm up, then send ``requests`` requests at each concurrency.

        Args:
            prompt: the user's message.
            max_tokens: of each answer, at most.
            requests: how many a level, besides ``warm_up`` before the first.
            warm_up: requests that are not counted.
            concurrencies: how many requests are under way at once, level by level.
            done: called after each request.

        Raises:
            KTServerError: The endpoint cannot be reached, or a request of the warm-up fails.
        """
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=10), headers=self._headers, limits=limits
        ) as client:
            self.model = self.model or await self._first_model(client)
            numbers = count(1)
            for _ in range(warm_up):
                await self._ask(client, f"{next(numbers)}. {prompt}", max_tokens)
                done()
            return [
                await self._level(client, concurrency, requests, lambda: f"{next(numbers)}. {prompt}", max_tokens, done)
                for concurrency in concurrencies
            ]

    async def _first_model(self, client: httpx.AsyncClient) -> str:
        try:
            response = await client.get(f"{self.url}/v1/models")
            response.raise_for_status()
            name: str = response.json()["data"][0]["id"]
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        except (httpx.HTTPStatusError, ValueError, LookupError, TypeError) as error:
            raise KTServerError(f"{self.url}/v1/models names no model ({error}); give one with --model.") from error
        return name

    def _unreachable(self, error: Exception) -> KTServerError:
        return KTServerError(f"{self.url} cannot be reached ({error}). Is the server up, and are host and port right?")

    async def _level(
        self, client: httpx.AsyncClient, concurrency: int, requests: int, prompt: Callable[[], str], max_tokens: int, done: Callable[[], object],
    ) -> Level:  # fmt: skip
        slots, answers, errors = asyncio.Semaphore(concurrency), [], []

        async def one() -> None:
            async with slots:
                try:
                    answers.append(await self._ask(client, prompt(), max_tokens))
                except KTServerError as error:
                    errors.append(str(error))
                done()

        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(requests)))
        return summary(concurrency, answers, errors, time.perf_counter() - started)

    async def _ask(self, client: httpx.AsyncClient, prompt: str, max_tokens: int) -> Answer:
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started, first, pieces, said = time.perf_counter(), None, 0, None
        try:
            async with client.stream("POST", f"{self.url}/v1/chat/completions", json=request) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise KTServerError(f"{self.url} refused a request ({response.status_code}): {text[:500]}")
                async for event in _events(response):
                    if "error" in event:
                        raise KTServerError(f"{self.url} broke an answer off: {event['error']}")
                    if any(map(_has_text, event.get("choices") or [])):
                        first = first or time.perf_counter()
                        pieces += 1
                    said = (event.get("usage") or {}).get("completion_tokens") or said
        except httpx.ConnectError as error:
            raise self._unreachable(error) from error
        except (httpx.HTTPError, ValueError) as error:
            raise KTServerError(f"{self.url} did not answer a request as it should: {error!r}.") from error
        ended = time.perf_counter()
        return Answer(ended - started, (first or ended) - started, said or pieces, said is not None)


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(delta.get("content") or delta.get("reasoning_content"))


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
            event: dict[str, Any] = json.loads(data)
            yield event


def summary(concurrency: int, answers: Sequence[Answer], errors: Sequence[str], wall: float) -> Level:
    """The figures of one level, which lasted ``wall`` seconds.

    >>> level = summary(1, [Answer(1.0, 0.2, 9, True), Answer(3.0, 0.2, 15, True)], [], 4.0)
    >>> level.mean, level.p50, level.tokens, level.total_rate, level.per_request_rate
    (2.0, 2.0, 24, 6.0, 7.5)
    """
    latencies = [answer.latency for answer in answers]
    firsts = [answer.first_token for answer in answers]
    rates = [
        (a.tokens - 1) / (a.latency - a.first_token) for a in answers if a.tokens > 1 and a.latency > a.first_token
    ]
    tokens = sum(answer.tokens for answer in answers)
    return Level(
        concurrency=concurrency,
        requests=len(answers) + len(errors),
        failed=len(errors),
        wall=wall,
        mean=_mean(latencies),
        p50=percentile(latencies, 50),
        p90=percentile(latencies, 90),
        p99=percentile(latencies, 99),
        first_token_mean=_mean(firsts),
        first_token_p90=percentile(firsts, 90),
        tokens=tokens,
        counted=all(answer.counted for answer in answers),
        per_request_rate=_mean(rates),
        total_rate=tokens / wall if wall else 0.0,
        first_error=errors[0] if errors else None,
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


def percentile(values: Sequence[float], percent: int) -> float:
    """Linear between the two nearest values, as numpy's default; NaN for none.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 90)
    3.7
    """
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
