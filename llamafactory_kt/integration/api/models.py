"""``/v1/models`` and ``/health``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from .errors import NotFound


class ModelEntry:
    """The one model of a server, whatever ``model`` a request names.

    Its name is ``API_MODEL_NAME``, LLaMA-Factory's variable, or the name of the checkpoint's directory.
    """

    def __init__(self, engine: Any):
        path = str(getattr(engine.tokenizer, "name_or_path", "") or "model")
        self._entry = {
            "id": os.environ.get("API_MODEL_NAME") or Path(path).name or path,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "llamafactory",
        }

    async def listed(self) -> dict[str, Any]:
        """``GET /v1/models``"""
        return {"object": "list", "data": [self._entry]}

    async def found(self, name: str) -> dict[str, Any]:
        """``GET /v1/models/{name}``"""
        if name != self._entry["id"]:
            raise NotFound(f"The model {name!r} does not exist; this server has {self._entry['id']!r}.")
        return self._entry


async def healthy() -> dict[str, str]:
    """``GET /health``, without a key: the server runs, and has loaded its model."""
    return {"status": "ok"}
