"""What LlamaBoard's form said when the model was loaded: to be shown after a reload of the page, and to be filled in again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

BOOSTERS = ("use_unsloth", "enable_liger_kernel")
"""keys that LLaMA-Factory's page always sets, mostly to false"""


class LoadedForm:
    """The form's values at a load that has succeeded.

    Args:
        manager: LLaMA-Factory's, which knows the elements of the page.
        data: element -> its value.
        args: the keys that were loaded.
    """

    def __init__(self, manager: Any, data: dict[Any, Any], args: dict[str, Any]):
        self._args = args
        self._values = {manager.get_id_by_elem(element): value for element, value in data.items()}

    def values(self, ids: Iterable[str]) -> list[Any]:
        """The value of each element, such as ``top.template``. Adapters by their paths: the model's name may be another one now."""
        adapters = self._args.get("adapter_name_or_path")
        paths = {"top.checkpoint_path": adapters.split(",")} if adapters else {}
        return [(self._values | paths).get(name) for name in ids]

    def as_yaml(self) -> str:
        """The same for ``llamafactory-cli chat``, as a code block. What is not set is left out, and so are secrets."""
        said = {
            key: value
            for key, value in self._args.items()
            if value not in (None, "", "auto") and not (key in BOOSTERS and not value) and not key.endswith("_token")
        }
        return f"```yaml\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True)}```"
