"""``llamafactory-cli chat config.yaml``, as a user runs it, in a process of its own."""

from __future__ import annotations

import pytest
from helpers.chats import EXPECTED, PROMPTS, answers, chat, chat_from_the_start, config
from helpers.children import child
from helpers.marks import needs_kernel

from llamafactory_kt.model.state import kt_state


@needs_kernel
def test_chat_with_adapter(tmp_path, demo):
    adapter = str(demo / "adapter")
    lines = [PROMPTS[0], "clear", PROMPTS[1], "clear", PROMPTS[2], "clear", PROMPTS[3], "exit"]
    result = chat_from_the_start(config(tmp_path, demo, adapter_name_or_path=adapter), lines)
    assert result.returncode == 0, result.stderr
    assert answers(result) == [EXPECTED[prompt]["adapter"] for prompt in PROMPTS]
    assert result.stdout.count("History has been removed.") == 3

    wanted = [
        "Loading model with KTransformers MoE backend",
        "KT mode: Loading only Attention LoRA. Original targets: [",
        "Filtered: [",
        f"Loading MoE LoRA from {adapter}/adapter_model.safetensors",
        f"Loaded MoE LoRA into 3 KT wrappers from {adapter}",
        f"Loaded adapter(s): {adapter}",
        "Layers wrapped  │ 3 (1-3)",
        "consumed 200 of 200 (PEFT 56, KT experts 144)",
        "all params: ",
        "Welcome to the CLI application",
    ]
    places = [result.stdout.find(line) for line in wanted]
    assert -1 not in places and places == sorted(places), dict(zip(wanted, places, strict=True))
    filtered = result.stdout.split("Filtered: [")[1].split("]")[0]
    assert "gate_proj" not in filtered and "q_proj" in filtered
    for chatter in ("CPUInfer[", "WorkerPool", "Goodbye", "DEBUG: Model structure"):
        assert chatter not in result.stdout
    assert "unexpected" not in (result.stdout + result.stderr).lower()


@needs_kernel
def test_chat_without_adapter(tmp_path, demo):
    result = chat(config(tmp_path, demo, kt_debug=True), [PROMPTS[0], PROMPTS[2], "exit"])
    assert result.returncode == 0, result.stderr
    assert answers(result) == [EXPECTED[PROMPTS[0]]["base"], EXPECTED[PROMPTS[2]]["base"]]
    assert "no adapter" in result.stdout and "KT wrappers count: 3" in result.stdout
    assert "Creating AMX_SFT_MOE_TP" in result.stdout, "kt_debug shows the kernel's own output"


@needs_kernel
def test_debug_block_and_overrides_on_the_command_line(tmp_path, demo):
    path = config(tmp_path, demo, adapter_name_or_path=str(demo / "adapter"))
    result = chat(path, [PROMPTS[0], "exit"], "kt_debug=true", "kt_lora_scope=attention")
    assert result.returncode == 0, result.stderr
    block = result.stdout.split("DEBUG: Model structure after loading")[1]
    assert "KT MoE LoRA layers: [1, 2, 3]" in block
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight: torch.Size([8, 128])" in block
    assert "PEFT config: {'default': LoraConfig(" in block and "gate_proj" not in block
    assert "kt_lora_scope: attention leaves out 24 of the adapter's 200 tensors" in result.stdout


@needs_kernel
def test_expert_lora_alone_changes_the_answer(demo):
    from llamafactory.chat import ChatModel

    model = ChatModel(
        {"model_name_or_path": str(demo / "model"), "adapter_name_or_path": str(demo / "adapter"), "template": "deepseek",
         "use_kt": True, "do_sample": False}
    )  # fmt: skip

    def ask(prompt):
        return model.chat([{"role": "user", "content": prompt}])[0].response_text

    whole = [ask(prompt) for prompt in PROMPTS]
    assert whole == [EXPECTED[prompt]["adapter"] for prompt in PROMPTS]
    for wrapper in kt_state(model.engine.model).wrappers:
        wrapper.engine.set_lora(None)
    assert all(ask(prompt) != answer for prompt, answer in zip(PROMPTS, whole, strict=True))


def test_a_kernel_without_lora_answers_where_those_with_it_cannot_run(tmp_path, demo):
    """kt-kernel's own switch simulates a CPU without the instructions: AVX2BF16 merges, and AMXBF16 says why it does
    not run."""
    path = config(tmp_path, demo, kt_backend="AVX2BF16", adapter_name_or_path=str(demo / "adapter"))
    result = chat(path, [PROMPTS[0], "exit"], KT_KERNEL_CPU_VARIANT="avx2")
    assert result.returncode == 0, result.stderr
    assert answers(result) == [EXPECTED[PROMPTS[0]]["adapter"]]
    assert "AVX2BF16 on avx2" in result.stdout and "merged into the weights" in result.stdout
    result = chat(config(tmp_path, demo), [PROMPTS[0]], KT_KERNEL_CPU_VARIANT="avx2")
    assert result.returncode and "kt_backend: AMXBF16 cannot run here" in result.stderr
    assert "KT_KERNEL_CPU_VARIANT=avx2" in result.stderr or "this CPU lacks avx512" in result.stderr


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"adapter_name_or_path": "/nowhere/adapter"}, "adapter_name_or_path: /nowhere/adapter does not exist"),
        ({"kt_backend": "AMXBF17", "kt_num_threads": 0}, "did you mean AMXBF16?\n- kt_num_threads must be a positive"),
        ({"kt_bakend": "torch"}, "kt_bakend"),
        ({"infer_backend": "vllm"}, "infer_backend: vllm does not work with use_kt"),
    ],
)
def test_mistakes_end_before_anything_is_loaded(tmp_path, demo, keys, message):
    result = chat(config(tmp_path, demo, kt_num_threads=keys.pop("kt_num_threads", None), **keys), ["exit"])
    assert result.returncode == 1 and message in result.stderr
    assert "Loading" not in result.stdout
    if "kt_bakend" not in keys:  # that one is LLaMA-Factory's to tell
        assert "Traceback" not in result.stderr and "\nError: " in f"\n{result.stderr}"


@pytest.mark.parametrize("how", ["kt_debug", "LLAMAFACTORY_KT_DEBUG"])
def test_a_traceback_where_it_is_asked_for(tmp_path, demo, how):
    path = config(tmp_path, demo, kt_backend="AMXBF17", kt_debug=True if how == "kt_debug" else None)
    result = chat(path, ["exit"], **({} if how == "kt_debug" else {how: "1"}))
    assert result.returncode == 1 and "Traceback" in result.stderr and "KTConfigError: " in result.stderr


def test_errors_that_come_while_loading(tmp_path, demo):
    """One line in a chat; a Python program gets the exception."""
    (tmp_path / "adapter").mkdir()
    path = config(tmp_path, demo, kt_backend="torch", adapter_name_or_path=str(tmp_path / "adapter"))
    result = chat(path, ["exit"])
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ") and "adapter_config.json is missing" in result.stderr
    code = f"import yaml; from llamafactory.chat import ChatModel; ChatModel(yaml.safe_load(open({str(path)!r})))"
    result = child(code)
    assert result.returncode == 1 and "Traceback" in result.stderr and "KTAdapterError" in result.stderr
