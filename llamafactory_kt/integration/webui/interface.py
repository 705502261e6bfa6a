"""``llamafactory.webui.interface``: ``webchat`` listens on this machine alone, if its YAML sets ``use_kt``.

LlamaBoard (``webui``) starts without knowing whether somebody will choose ``use_kt``; it says where it listens when that is loaded.
"""

from __future__ import annotations

from types import ModuleType

from ..listening import GRADIO, listening_locally
from ..patching import expect, replace


def patch(module: ModuleType) -> None:
    """Replace what runs the page of ``webchat``."""
    stock = expect(module, "run_web_demo")

    def run_web_demo() -> None:
        with listening_locally(GRADIO):
            stock()

    replace(module, run_web_demo)
