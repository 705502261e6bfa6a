"""The way to the CPU and back: buffers, the order of waits, and shared experts that are queued early.

Without a GPU the same code runs with events that only note their calls.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import ClassVar

import pytest
import torch
from tiny import make_adapter, make_model, merged_float32, per_token
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTExpertsConfig, apply_adapter, get_router_stats
from llamafactory_kt.experts.crossing import SHARED_EXPERTS, Crossing, EarlyShared
from llamafactory_kt.experts.module import KTExperts

IDS = torch.arange(2, 40)[None]


class Noted:
    """An event of a GPU that is never behind."""

    log: ClassVar[list[str]] = []

    def record(self):
        self.log.append("record")

    def synchronize(self):
        self.log.append("wait")


def crossing():
    Noted.log.clear()
    return Crossing(Noted, pinned=False)


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 9, (count, 2), generator=generator)
    return torch.randn(count, 8, generator=generator), index, torch.rand(count, 2, generator=generator)


def compute(hidden, index, weights):
    return hidden * weights.sum(1, keepdim=True) + index.sum(1, keepdim=True)


def test_one_wait_and_work_meanwhile():
    layer, log = crossing(), Noted.log
    given = tokens(5)
    out = layer.run(lambda *all: (log.append("experts"), compute(*all))[1], *given, lambda: log.append("meanwhile"))
    assert torch.equal(out, compute(*given))
    assert log == ["wait", "record", "meanwhile", "wait", "experts", "record"], "the first is for the buffers' last use"


def test_buffers_are_used_again_and_results_are_not():
    layer = crossing()
    given = [tokens(count, seed) for seed, count in enumerate([3, 40, 1, 40, 7])]
    found = [layer.run(compute, *each) for each in given]
    assert all(torch.equal(out, compute(*each)) for out, each in zip(found, given, strict=True))
    assert {name: len(buffer) for name, buffer in layer._buffers.items()} == {
        "hidden": 320, "index": 80, "weights": 80, "result": 320,
    }  # fmt: skip
    half = tuple(tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in tokens(3))
    assert layer.run(compute, *half).dtype == torch.bfloat16


def test_threads_cross_one_after_another():
    layer, given = crossing(), [tokens(6, seed) for seed in range(8)]
    wrong = []

    def work(each):
        wrong.extend(1 for _ in range(200) if not torch.equal(layer.run(compute, *each), compute(*each)))

    threads = [threading.Thread(target=work, args=(each,)) for each in given]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize("arch", ["deepseek_v2", "glm4_moe", "qwen2_moe"])
def test_shared_experts_are_computed_once_and_early(tmp_path, monkeypatch, arch):
    """Where the model calls them after the routed experts; where it calls them before, they stay where they are."""
    path = make_model(tmp_path / "model", arch)
    config = KTExpertsConfig(backend="torch", router_stats=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    with torch.inference_mode():
        wanted = [model(input_ids=ids).logits for ids in (IDS, IDS + 3, IDS[:, :5])]
    stats, log, layer = get_router_stats(model), [], crossing()
    for name, module in model.named_modules():
        shared = next((module._modules[part] for part in SHARED_EXPERTS if part in module._modules), None)
        if shared is not None and isinstance(module._modules.get("experts"), KTExperts):
            stock = shared.forward
            shared.forward = lambda x, stock=stock, name=name: (log.append(f"shared {name}"), stock(x))[1]
            module.experts.early = EarlyShared(shared)
            compute_stock = module.experts._compute
            module.experts._compute = lambda *all, stock=compute_stock, name=name: (log.append(f"routed {name}"), stock(*all))[1]  # fmt: skip

    def cross(self, *given):
        return layer.run(self._compute, *given, partial(self.early.queue, given[0]))

    monkeypatch.setattr(KTExperts, "forward", cross)
    with torch.inference_mode():
        found = [model(input_ids=ids).logits for ids in (IDS, IDS + 3, IDS[:, :5])]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    layers = len(model._kt_wrappers)
    assert len(log) == len(set(log)) * 3 == layers * 2 * 3, "each once in each of three calls"
    assert all(line.startswith("shared") for line in log[::2]), "before the routed ones, early or by the model itself"
    twice = get_router_stats(model)
    assert all((2 * stats[n].counts == twice[n].counts).all() for n in stats), "what is counted is not overwritten"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@needs_gpu
def test_on_a_gpu(tmp_path):
    """Against float32, with no wait but the crossing's own; and captured graphs are declined."""
    path = make_model(tmp_path / "model", "deepseek_v2")
    adapter = make_adapter(tmp_path / "adapter", path)
    config = KTExpertsConfig(adapter=str(adapter))
    model, _ = apply_adapter(
        AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, quantization_config=config, device_map={"": 0}
        ),
        adapter,
    )
    experts = model._kt_wrappers[0]
    hidden = torch.randn(7, experts.hidden_dim, device="cuda", dtype=torch.bfloat16)
    index = torch.rand(7, experts.num_experts, device="cuda").topk(experts.info.num_experts_per_tok).indices
    weights = torch.rand(index.shape, device="cuda")
    with torch.inference_mode():
        found = model(input_ids=IDS.cuda()).logits.float().cpu()
        assert per_token(found, merged_float32(path, adapter)(input_ids=IDS).logits) < 0.1
        wanted = experts.engine.forward(hidden.cpu(), index.cpu(), weights.cpu())
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = experts(hidden, index, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out.cpu(), wanted)
        with (
            pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            experts(hidden, index, weights)
