"""Nothing changes for users who do not ask for KT experts."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

from helpers.children import child
from helpers.interpreters import python
from helpers.models import make_model

LOGITS = """
    import torch
    from llamafactory.chat import ChatModel
    model = ChatModel(dict(model_name_or_path={model!r}, template="deepseek", infer_dtype="float32")).engine.model
    with torch.inference_mode():
        print("sum of logits:", model(input_ids=torch.arange(2, 30)[None]).logits.double().sum().item())
"""


def training(tmp_path: Path, model: Path) -> str:
    """Prints the losses of a training, and ends in one with use_kt."""
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    rows = [{"instruction": f"question {n}", "input": "", "output": f"answer {n}"} for n in range(8)]
    (data / "rows.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    arguments = {
        "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj",
        "model_name_or_path": str(model), "dataset": "rows", "dataset_dir": str(data), "template": "deepseek",
        "output_dir": str(output), "max_steps": 2, "per_device_train_batch_size": 2, "cutoff_len": 64, "seed": 1,
        "report_to": "none", "logging_steps": 1, "learning_rate": 0.01, "use_cpu": True,
        "overwrite_cache": True, "preprocessing_num_workers": 1,
    }  # fmt: skip
    return f"""
        from llamafactory.train.tuner import run_exp
        run_exp({arguments!r})
        import json
        print(json.dumps([r["loss"] for r in json.load(open({str(output)!r} + "/trainer_state.json"))["log_history"] if "loss" in r]))
        run_exp({{**{arguments!r}, "use_kt": True}})
    """


def test_training_is_unchanged(tmp_path, demo):
    """And so is a plain chat: with the hooks, and without them from the start."""
    model = make_model(tmp_path / "model", "qwen3_moe")
    first = textwrap.dedent(LOGITS.format(model=str(demo / "model")))
    hooked = child(first + textwrap.dedent(training(tmp_path, model)))
    stock = python(first + textwrap.dedent(training(tmp_path, model)), LLAMAFACTORY_KT_DISABLE="1")
    sums = [re.findall("^sum of logits: (.+)$", result.stdout, re.MULTILINE) for result in (hooked, stock)]
    assert len(sums[0]) == 1 and sums[0] == sums[1], hooked.stderr
    losses = [json.loads(result.stdout.splitlines()[-1]) for result in (hooked, stock)]
    assert len(losses[0]) == 2 and losses[0] == losses[1]
    assert all(result.returncode == 1 and "transformers-kt" in result.stderr for result in (hooked, stock)), (
        "training with use_kt is LLaMA-Factory's own affair"
    )
