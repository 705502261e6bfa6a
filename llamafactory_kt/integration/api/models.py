"""What a request's ``model`` names: the model, or one of its adapters. And ``/v1/models`` and ``/health``."""

from __future__ import annotations

import time
from typing import Any

from ...model.state import has_kt_experts, kt_state
from ...settings.adapter_choice import model_name
from .errors import NotFound

OWNER = "llamafactory"


class Models:
    """The model of a server and the adapters of ``kt_adapters``, by their names.

    Without ``kt_adapters`` there is one model, whatever a request calls it, unless it names an adapter of it. With them a name that nobody
    knows is refused, as it may be misspelt, and the answer of another adapter looks like one of the right one.
    """

    def __init__(self, engine: Any):
        self.name = model_name(str(getattr(engine.tokenizer, "name_or_path", "") or "model"))
        """the model's own, for what the configuration applies"""
        model = getattr(engine, "model", None)
        self._adapters = list(getattr(kt_state(model), "choices", ())) if has_kt_experts(model) else []
        own = {"object": "model", "created": int(time.time()), "owned_by": OWNER}
        self._entries = {self.name: {"id": self.name, **own}}
        self._entries |= {name: {"id": name, **own, "parent": self.name} for name in self._adapters}

    def adapter(self, name: str) -> str | None:
        """The adapter that a request's ``model`` chooses; None: what the configuration applies.

        Raises:
            NotFound: There are adapters to choose from, or this is the model's name with an adapter's, and there is no such adapter.
        """
        return self._chosen(name) if self._adapters or name.startswith(f"{self.name}:") else None

    def _chosen(self, name: str) -> str | None:
        if name == self.name:
            return None
        adapter = name.removeprefix(f"{self.name}:")
        if adapter not in self._adapters:
            there = ", ".join(map(repr, self._entries))
            raise NotFound(f"The model {name!r} does not exist; this server has {there}.")
        return adapter

    async def listed(self) -> dict[str, Any]:
        """``GET /v1/models``"""
        return {"object": "list", "data": [*self._entries.values()]}

    async def found(self, name: str) -> dict[str, Any]:
        """``GET /v1/models/{name}``"""
        return self._entries[self._chosen(name) or self.name]


async def healthy() -> dict[str, str]:
    """``GET /health``, without a key: the server runs, and has loaded its model."""
    return {"status": "ok"}
