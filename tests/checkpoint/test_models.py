"""Which models are served and which refused; checkpoints in every layout; the native classes with trust_remote_code."""

from __future__ import annotations

import json
import shutil
import sys
from typing import ClassVar

import pytest
import torch
from conftest import needs_kernel
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, make_model, rel, write_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llamafactory_kt import KTExpertsConfig, KTModelError, KTPathError, apply_adapter
from llamafactory_kt.checkpoint.discovery import find_experts


def empty(architecture, **keys):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **keys))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_accepted(name):
    modules = find_experts(empty(name, **ARCHITECTURES[name]))
    first = 1 if "first_k_dense_replace" in ARCHITECTURES[name] else 0
    assert [m.layer for m in modules] == list(range(first, 3))
    assert all(m.num_experts_per_tok == 3 and m.shape.num_experts == 6 for m in modules)


def test_layers_that_are_not_moe():
    keys = {**ARCHITECTURES["qwen3_moe"], "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert [m.layer for m in find_experts(empty("qwen3_moe", **keys))] == [1, 5]


SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("llama", SMALL, "LlamaForCausalLM has no routed experts"),
        ("gpt_oss", {**SMALL, "num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 32}, "they have biases"),
        (
            "qwen3_moe",
            {**ARCHITECTURES["qwen3_moe"], "hidden_act": "gelu"},
            "they do not compute down(silu(gate x) * up x)",
        ),
        ("nemotron_h", {}, "they have no gate projection"),
        (
            "granitemoe",
            {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
            "is a mixture of experts, but its experts are not",
        ),
    ],
)
def test_refused_with_the_reason(name, keys, message):
    with pytest.raises(KTModelError) as error:
        find_experts(empty(name, **keys))
    assert message in str(error.value)


def test_experts_that_compute_something_else_are_found_out(monkeypatch):
    """A class that keeps the contract's form and clamps inside its forward."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    plain = Qwen3MoeExperts.forward.__wrapped__

    def clamped(self, hidden_states, index, weights):
        return plain(self, hidden_states.clamp(max=1.0), index, weights)

    forward = type(Qwen3MoeExperts.forward)(
        Qwen3MoeExperts.forward.__code__, globals(), closure=Qwen3MoeExperts.forward.__closure__
    )
    forward.__wrapped__ = clamped
    monkeypatch.setattr(Qwen3MoeExperts, "forward", forward)
    with pytest.raises(KTModelError, match="they do not compute"):
        find_experts(empty("qwen3_moe", **ARCHITECTURES["qwen3_moe"]))


def load(path, backend="torch", **keys):
    config = KTExpertsConfig(backend=backend)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config, **keys)


@torch.inference_mode()
def logits(model):
    return model(input_ids=torch.arange(2, 30)[None]).logits


def stock(path):
    return logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral"])
def test_sharded_and_fused_checkpoints(tmp_path, name):
    path = make_model(tmp_path / "single", name)
    wanted = stock(path)
    assert torch.allclose(logits(load(path)), wanted, atol=1e-4)
    sharded = make_model(tmp_path / "sharded", name, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert torch.allclose(logits(load(sharded)), wanted, atol=1e-4)
    fused = make_model(tmp_path / "fused", name, save_original_format=False)
    assert any(key.endswith("gate_up_proj") for key in load_file(fused / "model.safetensors"))
    assert torch.allclose(logits(load(fused)), wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torch_engine_keeps_the_checkpoints_precision(tmp_path, dtype):
    path = make_model(tmp_path / "m", "qwen3_moe", dtype=dtype)
    assert torch.allclose(logits(load(path)), stock(path), atol=1e-4)


@needs_kernel
def test_the_kernel_says_that_it_rounds_to_bfloat16(tmp_path, kt_log):
    load(make_model(tmp_path / "m", "qwen3_moe", dtype=torch.float32), backend="AMXBF16")
    assert "The experts are stored as F32; AMXBF16 computes them in bfloat16" in kt_log.text


def test_the_last_tokens_logits_do_not_copy_the_output_layer(tmp_path):
    """torch multiplies a cut-out last token batch by batch, with the weight copied, unless it comes with strides of its own."""
    model = load(make_model(tmp_path / "m", "deepseek_v2")).requires_grad_(False)

    class Seen(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(isinstance(arg, torch.Tensor) and model.config.vocab_size in arg.shape for arg in args):
                self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    ids = torch.arange(2, 32).view(2, 15)
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1:]
        with Seen() as seen:
            last = model(input_ids=ids, logits_to_keep=1).logits
    assert "mm" in seen.names, seen.names
    assert not {"bmm", "copy_", "clone"} & set(seen.names)
    assert torch.allclose(last.float(), whole.float(), atol=1e-2)


def test_no_expert_tensor_is_read_by_transformers_and_none_is_called_unexpected(tmp_path, capsys):
    path = make_model(tmp_path / "m", "deepseek_v2")
    model, info = load(path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    tensors = load_file(path / "model.safetensors")
    save_file(
        {**tensors, "model.layers.1.mlp.something.weight": torch.ones(1)}, path / "model.safetensors", {"format": "pt"}
    )
    _, info = load(path, output_loading_info=True)
    assert info["unexpected_keys"] == {"model.layers.1.mlp.something.weight"}, "only the experts are silenced"


def edited(tmp_path, change):
    path = make_model(tmp_path / "m", "deepseek_v2")
    tensors = change(load_file(path / "model.safetensors"))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


GATE = "model.layers.2.mlp.experts.4.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != GATE}, f"missing 1 expert tensors of layer 2: {GATE}"),
        (lambda t: {k: v for k, v in t.items() if ".layers.1.mlp.experts." not in k}, "missing 18 expert tensors of layer 1: model.layers.1.mlp.experts.0.gate_proj.weight"),
        (lambda t: {**t, GATE: t[GATE][:, :-1].contiguous()}, f"{GATE} has shape (96, 63), config.json asks for (96, 64)"),
        (lambda t: {**t, GATE: t[GATE].to(torch.float8_e4m3fn)}, f"{GATE} is F8_E4M3"),
    ],
)  # fmt: skip
def test_checkpoints_that_cannot_be_right(tmp_path, change, message):
    with pytest.raises(KTModelError) as error:
        load(edited(tmp_path, change))
    assert message in str(error.value)


def test_truncated_checkpoint(tmp_path):
    path = make_model(tmp_path / "m", "deepseek_v2")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:10_000])
    with pytest.raises(
        KTModelError, match=r"model\.safetensors cannot be read as safetensors .*; download or copy it again"
    ):
        load(path)


def chat_model(path, **keys):
    from llamafactory.chat import ChatModel

    return ChatModel(
        {"model_name_or_path": str(path), "template": "deepseek", "use_kt": True, "do_sample": False, **keys}
    )


def test_missing_model_and_quantised_model(tmp_path, demo):
    with pytest.raises(KTPathError, match=r"model_name_or_path: .*nowhere does not exist"):
        chat_model(tmp_path / "nowhere")
    path = shutil.copytree(demo / "model", tmp_path / "gptq")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KTModelError, match="is a quantised checkpoint"):
        chat_model(path)


def test_dense_model_is_refused_through_llamafactory(tmp_path):
    config = AutoConfig.for_model("llama", **SMALL, num_key_value_heads=2, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    for file in make_model(tmp_path / "moe", "mixtral").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "dense")
    with pytest.raises(KTModelError, match="has no routed experts"):
        chat_model(tmp_path / "dense")


TOKENIZER_CODE = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    own = True
"""


@needs_kernel
@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_native_classes_in_spite_of_remote_code(tmp_path, demo, own_tokenizer):
    """Old DeepSeek checkpoints ship code for transformers 4: it must not even be imported. A tokenizer that exists only
    as remote code is another matter."""
    path = shutil.copytree(demo / "model", tmp_path / "remote")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(config))
    for name in ("modeling_deepseek",) if own_tokenizer else ("configuration_deepseek", "modeling_deepseek"):
        (path / f"{name}.py").write_text("raise RuntimeError('remote code was imported')\n")
    if own_tokenizer:  # transformers imports the remote configuration on its way to such a tokenizer
        code = "from transformers import PretrainedConfig\n\n\nclass DeepseekV2Config(PretrainedConfig):\n    model_type = 'deepseek_v2'\n"
        (path / "configuration_deepseek.py").write_text(code)
        (path / "tokenization_own.py").write_text(TOKENIZER_CODE)
        tokenizer = json.loads((path / "tokenizer_config.json").read_text())
        tokenizer |= {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
        }
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    engine = chat_model(path, trust_remote_code=True).engine
    assert type(engine.model).__module__ == "transformers.models.deepseek_v2.modeling_deepseek_v2"
    assert type(engine.model)._auto_class is None and type(engine.model.config)._auto_class is None
    if own_tokenizer:
        stock_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        assert type(engine.tokenizer).__name__ == type(stock_tokenizer).__name__


def test_kernel_missing_or_made_for_another_cpu(demo, monkeypatch, tmp_path):
    import kt_kernel.sft.amx

    from llamafactory_kt import KTKernelError
    from llamafactory_kt.model import kt_runtime
    from llamafactory_kt.tools.quantize import quantize_model

    monkeypatch.setattr(kt_runtime, "missing_cpu_flags", lambda build="": ["amx_tile"] if build == "amx" else [])
    monkeypatch.setattr("kt_kernel.__cpu_variant__", "amx")
    with pytest.raises(KTKernelError, match=r"kt_backend: AMXBF16 cannot run here: this CPU lacks amx_tile"):
        chat_model(demo / "model", kt_backend="AMXBF16")
    monkeypatch.setattr("kt_kernel.__cpu_variant__", "avx2")
    monkeypatch.setitem(kt_kernel.sft.amx._SFT_METHOD_TO_CLASS, "AMXBF16_SFT", None)
    with pytest.raises(KTKernelError, match="kt-kernel's variant 'avx2' has no kernel for AMXBF16"):
        chat_model(demo / "model", kt_backend="AMXBF16")
    monkeypatch.setitem(sys.modules, "kt_kernel", None)
    with pytest.raises(KTKernelError, match="kt-kernel is not installed or does not load"):
        chat_model(demo / "model", kt_backend="AMXBF16")
    with pytest.raises(KTKernelError, match="pip install kt-kernel"):
        load(demo / "model", backend="AMXBF16")
    with pytest.raises(KTKernelError, match="cannot pack int8 weights here: kt-kernel is not installed"):
        quantize_model(demo / "model", tmp_path / "packed", "int8")
    assert not (tmp_path / "packed").exists()
    summary = load(demo / "model", backend="auto")._kt_summary
    assert summary["engine"] == "oneDNN"
    assert summary["reason"].startswith("AMXBF16 cannot run: kt-kernel is not installed")


@needs_kernel
@pytest.mark.parametrize("finetuning_type", ["lora", "full", "freeze"])
def test_every_finetuning_type_ends_in_kt_experts(demo, finetuning_type):
    assert len(chat_model(demo / "model", finetuning_type=finetuning_type).engine.model._kt_wrappers) == 3


@pytest.mark.parametrize("prefix", ["base_model.model.model.language_model.", "model.language_model."])
def test_composite_model(tmp_path, prefix):
    """A vision-language model: its text model's experts, attention and their LoRA, against a plain float32 sum."""
    from transformers import AutoModelForImageTextToText

    text = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 96,
        "pad_token_id": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    torch.manual_seed(0)
    stock = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    stock.save_pretrained(tmp_path / "model")

    tensors, weights = {}, dict(stock.named_parameters())

    def lora(module, out, size):
        a, b = torch.randn(5, size) * size**-0.5, torch.randn(out, 5) * 0.2
        tensors[f"{prefix}{module}.lora_A.weight"], tensors[f"{prefix}{module}.lora_B.weight"] = a, b
        return 2 * (b @ a)

    ids = torch.arange(5, 40)[None]
    with torch.inference_mode():
        base = stock(input_ids=ids).logits
        for layer in range(2):
            name = f"model.language_model.layers.{layer}"
            weights[f"{name}.self_attn.q_proj.weight"] += lora(f"layers.{layer}.self_attn.q_proj", 64, 64)
            for expert in range(6):
                module = f"layers.{layer}.mlp.experts.{expert}"
                gate_up = torch.cat([lora(f"{module}.{p}_proj", 96, 64) for p in ("gate", "up")])
                weights[f"{name}.mlp.experts.gate_up_proj"][expert] += gate_up
                weights[f"{name}.mlp.experts.down_proj"][expert] += lora(f"{module}.down_proj", 64, 96)
        wanted = stock(input_ids=ids).logits
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    write_config(tmp_path / "adapter", "base", r=5, lora_alpha=10, target_modules=["q_proj", "gate_proj"])

    ours = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", dtype=torch.float32, quantization_config=KTExpertsConfig(backend="torch")
    )
    with torch.inference_mode():
        assert rel(ours(input_ids=ids).logits, base) < 2e-5
        wrapped, report = apply_adapter(ours, tmp_path / "adapter")
        assert (report.peft, report.experts) == (4, 72)
        assert rel(wrapped(input_ids=ids).logits, wanted) < 2e-5 < rel(base, wanted)
