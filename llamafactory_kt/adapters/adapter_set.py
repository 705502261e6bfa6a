"""The adapters of a model. Their LoRA add up; the experts see one LoRA with the ranks of all side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ground.errors import KTAdapterError, name_some
from .adapter import Adapter
from .expert_lora import ExpertLora, ExpertsShape
from .keys import split_module
from .opening import open_adapter


@dataclass(frozen=True)
class AdapterSet:
    """Any number of adapters, in the order they were given."""

    adapters: tuple[Adapter, ...] = ()

    @property
    def layers(self) -> list[int]:
        """Layers with routed-expert LoRA, ascending."""
        return sorted({layer for adapter in self.adapters for layer in adapter.layers})

    def in_layer(self, layer: int) -> list[Adapter]:
        """The adapters with LoRA on a layer's experts."""
        return [adapter for adapter in self.adapters if layer in adapter.layers]

    def rank(self, layer: int) -> int:
        """The rank of a layer's experts, 0 for none."""
        return sum(adapter.rank(layer) for adapter in self.in_layer(layer))

    def scaling(self, layer: int) -> float:
        """:meth:`Adapter.scaling` of the first adapter with LoRA on the layer's experts, 1 for none."""
        return next((adapter.scaling(layer) for adapter in self.in_layer(layer)), 1.0)

    def check_fits(self, shapes: Mapping[int, ExpertsShape]) -> None:
        """Each adapter's :meth:`Adapter.check_fits`."""
        for adapter in self.adapters:
            adapter.check_fits(shapes)

    def read_layer(self, layer: int, shape: ExpertsShape) -> ExpertLora | None:
        """Read one layer's LoRA, stacked over the model's experts; None if the layer has none."""
        loras = [adapter.read_layer(layer, shape) for adapter in self.in_layer(layer)]
        return ExpertLora.sum_of(loras) if len(loras) > 1 else loras[0] if loras else None


def open_adapters(
    adapters: AdapterSet | Adapter | str | Path | Sequence[str | Path | Adapter] | None,
    moe_lora: str | Path | None = None,
) -> AdapterSet:
    """Open any number of local adapters by their headers.

    Args:
        adapters: directories, or adapters that are open already.
        moe_lora: a ``moe_lora.pt`` with the routed experts' part of one directory, or alone.

    Raises:
        KTPathError: There is no such directory or file.
        KTAdapterError: As :func:`open_adapter`; or one of several adapters is more than LoRA, which does not add up.
    """
    if isinstance(adapters, AdapterSet):
        return adapters
    if adapters is None or isinstance(adapters, Adapter | str | Path):
        adapters = [] if adapters is None else [adapters]
    if moe_lora is not None:
        if len(adapters) > 1:
            raise KTAdapterError(f"{moe_lora} goes with one adapter, found {len(adapters)}: {name_some(adapters)}.")
        first = adapters[0] if adapters else None
        if isinstance(first, Adapter):
            raise KTAdapterError(f"{moe_lora} goes with a directory; {first.directory} is open already.")
        return AdapterSet((open_adapter(first, moe_lora),))
    opened = tuple(a if isinstance(a, Adapter) else open_adapter(a) for a in adapters)
    if len(opened) > 1:
        for adapter in opened:
            _check_adds_up(adapter)
    return AdapterSet(opened)


def _check_adds_up(adapter: Adapter) -> None:
    settings = adapter.settings
    whole = (name for name in adapter.other_names if not split_module(name)[1].startswith("lora_"))
    saved = f"modules_to_save: {settings.modules_to_save}" if settings.modules_to_save else next(whole, None)
    wrong = "use_dora" if settings.use_dora else saved
    if wrong:
        raise KTAdapterError(
            f"{settings.path} has {wrong}, which cannot be added to other adapters: only LoRA is a sum. Use this adapter "
            "alone, or merge it into the model first (llamafactory-kt merge)."
        )
