"""Stock transformers at its fastest: the whole adapter merged into the weights, and the fastest experts implementation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...adapters import AdapterSet
from ...checkpoint.discovery import find_experts
from ...checkpoint.opening import MoEModel
from ...ground.errors import KTModelError, name_some
from ...ground.machine import available_memory
from ...peft_side.swap import merge_dense_part

TIME_LIMIT = 6.0
"""seconds after which an implementation is not timed again"""


@torch.no_grad()
def merge_into(model: Any, adapters: AdapterSet, scope: str = "all") -> Any:
    """Merge adapters into a loaded stock model.

    Each weight becomes ``W + ΔW``, summed in float32 and rounded once.

    Args:
        scope: as ``kt_lora_scope``.

    Raises:
        KTAdapterError: An adapter does not fit the model.
        KTModelError: accelerate has offloaded a part of the model to disk.
    """
    if not adapters.adapters:
        return model
    with _without_offload_hooks(model):
        moe = MoEModel(model)
        merge_dense_part(model, moe.fit(adapters, scope))
        for module in moe.experts:
            loras = [a.read_layer(module.layer, module.shape) for a in adapters.adapters if module.layer in a.layers]
            for name in module.weights if loras else ():
                weight = getattr(model.get_submodule(module.name), name)
                for number in range(module.shape.num_experts):
                    total = weight[number].float()
                    for lora in loras:
                        total += lora.fused_delta(name, module.shape.fused, number).to(total.device)
                    weight[number] = total.to(weight.dtype)
        return model


@contextmanager
def _without_offload_hooks(model: Any) -> Iterator[None]:
    """Take accelerate's hooks off, and put them back: while they are on, offloaded weights are on the meta device."""
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    places = getattr(model, "hf_device_map", {})
    if "disk" in places.values():
        raise KTModelError(
            "stock LLaMA-Factory does not find room for this model on the GPUs and in memory, and leaves a part of it on disk, "
            "which is not measured. Measure without --against stock, or a smaller model."
        )
    offloaded = len(set(places.values())) > 1
    if offloaded:
        remove_hook_from_submodules(model)
    yield
    if offloaded:
        dispatch_model(model, places, skip_keys=model._skip_keys_device_placement)


class FastestExperts:
    """Switches a model to the experts implementation of transformers (``transformers/integrations/moe.py``) that is
    fastest for the number of tokens of the next forward.

    Args:
        prompt_tokens: lengths of the prompts to come. For each, and for one token, all implementations are timed now;
            those that cannot run here are left out.

    Raises:
        KTModelError: None runs.
    """

    def __init__(self, model: Any, prompt_tokens: Sequence[int]):
        self._model = model
        self.best = {tokens: self._fastest(tokens) for tokens in (*prompt_tokens, 1)}
        """tokens -> implementation"""

    def __call__(self, tokens: int) -> None:
        self._model.set_experts_implementation(self.best[tokens])

    def __str__(self) -> str:
        return ", ".join(f"{name} for {tokens}" for tokens, name in self.best.items())

    def _fastest(self, tokens: int) -> str:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        candidates: list[str] = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
        times = {name: seconds for name in candidates if (seconds := self._time(name, tokens)) is not None}
        if not times:
            raise KTModelError(f"None of transformers' experts implementations runs here: {name_some(candidates)}.")
        return min(times, key=times.__getitem__)

    def _time(self, name: str, tokens: int) -> float | None:
        """Median seconds of a forward, without the first if there are several; None if the implementation cannot run."""
        if name == "batched_mm" and tokens * self._bytes_per_token() > available_memory() // 2:
            return None
        vocabulary = self._model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        times: list[float] = []
        try:
            self._model.set_experts_implementation(name)
            with torch.inference_mode():
                while len(times) < (3 if tokens > 1 else 9) and sum(times) < TIME_LIMIT:
                    ids = torch.randint(10, vocabulary, (1, tokens), generator=generator).to(self._model.device)
                    started = time.perf_counter()
                    self._model(input_ids=ids, logits_to_keep=1).logits.argmax(-1).tolist()
                    times.append(time.perf_counter() - started)
        except (RuntimeError, ValueError, ImportError):  # made for other hardware
            return None
        return statistics.median(times[1:] or times)

    def _bytes_per_token(self) -> int:
        """Bytes of weights that batched_mm copies for each token."""
        module = find_experts(self._model)[0]
        size: int = sum(p.nbytes for p in self._model.get_submodule(module.name).parameters())
        return size // module.shape.num_experts * module.num_experts_per_tok
