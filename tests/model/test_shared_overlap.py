"""Shared experts that are computed at the same time as the routed experts."""

from __future__ import annotations

import pytest
import torch
from helpers.loading import load
from helpers.models import make_model
from helpers.streams import LateStream

from llamafactory_kt import get_router_stats
from llamafactory_kt.model.experts_module import KTExperts
from llamafactory_kt.model.on_gpu.shared_overlap import SHARED_EXPERTS, SharedExpertsOverlap
from llamafactory_kt.model.on_gpu.transfer import HostTransfer
from llamafactory_kt.model.state import kt_state

IDS = torch.arange(2, 40)[None]


@pytest.mark.parametrize("arch", ["deepseek_v2", "glm4_moe", "qwen2_moe"])
def test_shared_experts_are_computed_once_and_early(tmp_path, monkeypatch, arch):
    """In models that call them after the routed experts; models that call them before are left as they are."""
    model = load(make_model(tmp_path / "model", arch), "torch", dtype=torch.float32, router_stats=True)
    with torch.inference_mode():
        wanted = [model(input_ids=ids).logits for ids in (IDS, IDS + 3, IDS[:, :5])]
    stats, log, transfer = get_router_stats(model), [], HostTransfer(LateStream(behind=False))
    for name, module in model.named_modules():
        shared = next((module._modules[part] for part in SHARED_EXPERTS if part in module._modules), None)
        if shared is not None and isinstance(module._modules.get("experts"), KTExperts):
            stock = shared.forward
            shared.forward = lambda x, stock=stock, name=name: (log.append(f"shared {name}"), stock(x))[1]
            module.experts.overlap = SharedExpertsOverlap(shared)
            engine = module.experts.engine
            compute = engine.forward
            engine.forward = lambda *all, stock=compute, name=name: (log.append(f"routed {name}"), stock(*all))[1]

    def as_with_a_gpu(self, hidden, index, weights):
        meanwhile = lambda: self.overlap.queue(hidden)  # noqa: E731
        return transfer.forward(self.engine, (hidden, index, weights), meanwhile, self.router_counts.add)

    monkeypatch.setattr(KTExperts, "forward", as_with_a_gpu)
    with torch.inference_mode():
        found = [model(input_ids=ids).logits for ids in (IDS, IDS + 3, IDS[:, :5])]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    layers = len(kt_state(model).wrappers)
    assert len(log) == len(set(log)) * 3 == layers * 2 * 3, "each once in each of three calls"
    assert all(line.startswith("shared") for line in log[::2]), "before the routed ones, early or by the model itself"
    twice = get_router_stats(model)
    assert all((2 * stats[n].counts == twice[n].counts).all() for n in stats), "what is counted is not overwritten"
