"""Latency of an OpenAI-compatible endpoint, one request after the other; docs/serving.md names tools for load.

Answers are streamed, to time the first token. Each prompt begins with another number, so that no prefix cache answers.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import httpx
import numpy as np
from tqdm import tqdm

from ...ground.errors import KTServerError


class RequestTiming(NamedTuple):
    """One request; times in seconds."""

    latency: float
    first_token: float
    """time to the first text"""
    tokens: int
    counted: bool
    """whether the endpoint reported ``tokens``; otherwise they are the chunks of the stream"""


@dataclass(frozen=True)
class EndpointLatency:
    """All requests; times in seconds, the rate in tokens per second after the first token."""

    endpoint: str
    model: str
    requests: int
    mean: float
    p50: float
    p90: float
    p99: float
    first_token_mean: float
    tokens: int
    counted: bool
    per_request_rate: float | None


def measure_endpoint(
    url: str, model: str | None, api_key: str | None, prompt: str, max_tokens: int, requests: int, warm_up: int
) -> EndpointLatency:
    """Send ``warm_up`` requests that do not count, then ``requests`` that do.

    Args:
        url: with or without ``/v1``.
        model: the name to send; None for the first that the endpoint lists.
        api_key: sent as a bearer token.
        max_tokens: the most tokens of an answer.

    Raises:
        KTServerError: The endpoint cannot be reached, or a request fails.
    """
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    numbers = tqdm(range(1, warm_up + requests + 1), unit="request", delay=1.0)
    try:
        with httpx.Client(headers=headers, timeout=httpx.Timeout(None, connect=10)) as client:
            model = model or _first_model(client, url)
            timings = [_ask(client, url, model, f"{number}. {prompt}", max_tokens) for number in numbers]
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise KTServerError(
            f"{url} cannot be reached ({error}). Is the server up, and are host and port right?"
        ) from error
    except (httpx.HTTPError, ValueError) as error:
        raise KTServerError(f"{url} did not answer a request as it should: {error!r}.") from error
    return summarize(url, model, timings[warm_up:])


def _first_model(client: httpx.Client, url: str) -> str:
    response = client.get(f"{url}/v1/models")
    try:
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError) as error:
        raise KTServerError(f"{url}/v1/models names no model ({error}); give one with --model.") from error


def _ask(client: httpx.Client, url: str, model: str, prompt: str, max_tokens: int) -> RequestTiming:
    request = {
        "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    started, first, chunks, reported = time.perf_counter(), None, 0, None
    with client.stream("POST", f"{url}/v1/chat/completions", json=request) as response:
        if response.status_code != 200:
            text = response.read().decode(errors="replace")
            raise KTServerError(f"{url} refused a request ({response.status_code}): {text[:500]}")
        for line in response.iter_lines():
            if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                event = json.loads(data)
                if "error" in event:
                    raise KTServerError(f"{url} broke an answer off: {event['error']}")
                deltas = [choice.get("delta") or {} for choice in event.get("choices") or []]
                if any(delta.get("content") or delta.get("reasoning_content") for delta in deltas):
                    first, chunks = first or time.perf_counter(), chunks + 1
                reported = (event.get("usage") or {}).get("completion_tokens") or reported
    ended = time.perf_counter()
    return RequestTiming(ended - started, (first or ended) - started, reported or chunks, reported is not None)


def summarize(endpoint: str, model: str, timings: list[RequestTiming]) -> EndpointLatency:
    """Summarize at least one request; percentiles are interpolated linearly.

    >>> found = summarize("http://x", "m", [RequestTiming(1.0, 0.2, 9, True), RequestTiming(3.0, 0.2, 15, True)])
    >>> found.mean, found.p50, found.p90, found.tokens, found.per_request_rate
    (2.0, 2.0, 2.8, 24, 7.5)
    """
    latencies, firsts, tokens, counted = zip(*timings, strict=True)
    rates = [
        (t.tokens - 1) / (t.latency - t.first_token) for t in timings if t.tokens > 1 and t.latency > t.first_token
    ]
    p50, p90, p99 = np.percentile(latencies, [50, 90, 99]).tolist()
    return EndpointLatency(
        endpoint, model, len(timings), fmean(latencies), p50, p90, p99, fmean(firsts), sum(tokens), all(counted),
        fmean(rates) if rates else None,
    )  # fmt: skip
