"""``/metrics`` in Prometheus' text format, by prometheus-client, an optional dependency.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from fastapi import HTTPException
from fastapi.responses import Response

from ...model.state import has_kt_experts, kt_state
from ..generation import Generation
from .disconnect import GONE

INSTALL = "pip install prometheus-client"
_PREFIX = "llamafactory_kt_"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts for one server; without prometheus-client nothing.

    Args:
        engine: LLaMA-Factory's.
        name: the model's, which stands for what the configuration applies.
    """

    def __init__(self, engine: Any, name: str):
        self._name = name
        self._active: set[Generation] = set()
        self._registry: Any = None
        if find_spec("prometheus_client") is None:
            return
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # process_resident_memory_bytes and others

        def made(kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
            return kind(_PREFIX + name, text, labels, registry=registry, **more)

        self._requests = made(
            Counter, "requests", "Requests that have ended, by path and HTTP status.", "path", "status"
        )
        self._prompt = made(Counter, "prompt_tokens", "Tokens of prompts, by model or adapter.", "model")
        self._cached = made(
            Counter,
            "cached_prompt_tokens",
            "Tokens of prompts that were kept from earlier, by model or adapter.",
            "model",
        )
        self._generated = made(Counter, "generated_tokens", "Tokens of answers, by model or adapter.", "model")
        self._switches = made(Histogram, "adapter_switch_seconds", "Exchanges of the adapter.", buckets=_SECONDS)
        self._first = made(Histogram, "first_token_seconds", "From a request to its first token.", buckets=_SECONDS)
        self._total = made(Histogram, "request_seconds", "From a request to the end of its answer.", buckets=_SECONDS)
        waiting = made(Gauge, "waiting_requests", "Requests whose generation has not begun.")
        waiting.set_function(lambda: sum(not one.begun for one in [*self._active]))
        running = made(Gauge, "running_requests", "Requests that read their prompt or are answered.")
        running.set_function(lambda: sum(one.begun for one in [*self._active]))
        model = getattr(engine, "model", None)
        if has_kt_experts(model) and hasattr(kt_state(model), "prompts"):
            held = made(Gauge, "prompt_cache_bytes", "Keys and values that are kept of earlier prompts.")
            held.set_function(lambda: getattr(kt_state(model).prompts, "nbytes", 0))
            sequences = made(Gauge, "prompt_cache_sequences", "Prompts and answers that are kept.")
            sequences.set_function(lambda: getattr(kt_state(model).prompts, "sequences", 0))

    @contextlib.contextmanager
    def follow(self, generation: Generation) -> Iterator[None]:
        """While an answer waits for its turn and is generated."""
        started = time.perf_counter()
        self._active.add(generation)
        try:
            yield
        finally:
            self._active.discard(generation)
            if self._registry is not None and generation.first_token_at:
                self._first.observe(max(0.0, generation.first_token_at - started))

    def tokens(self, adapter: str | None, read: int, cached: int, written: int) -> None:
        """Note what a request to an adapter, or to the model, took."""
        if self._registry is not None:
            for counter, number in ((self._prompt, read), (self._cached, cached), (self._generated, written)):
                counter.labels(adapter or self._name).inc(number)

    def switched(self, seconds: float) -> None:
        """Note an exchange of the adapter."""
        if self._registry is not None:
            self._switches.observe(seconds)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Note the end of a request."""
        if self._registry is not None:
            self._requests.labels(path, str(status)).inc()
            self._total.observe(seconds)

    async def shown(self) -> Response:
        """``GET /metrics``"""
        if self._registry is None:
            raise HTTPException(501, f"/metrics needs prometheus-client in the server's environment: {INSTALL}")
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class CountRequests:
    """ASGI middleware: counts the requests that ask for an answer."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # nginx's, for a client that went away before an answer

        async def send_noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start" and GONE not in scope:
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noting)
        finally:
            # other paths are whatever somebody tries
            path = scope["path"] if scope["path"].endswith("completions") and status != 404 else "other"
            self._metrics.request(path, status, time.perf_counter() - started)
