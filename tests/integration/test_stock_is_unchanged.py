"""Nothing changes for users who do not ask for KT experts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from helpers.interpreters import python
from helpers.models import make_model

LOGITS = """
    import torch
    from llamafactory.chat import ChatModel
    model = ChatModel(dict(model_name_or_path={model!r}, template="deepseek", infer_dtype="float32")).engine.model
    with torch.inference_mode():
        print(model(input_ids=torch.arange(2, 30)[None]).logits.double().sum().item())
"""


def test_plain_chat_is_unchanged(demo):
    code = LOGITS.format(model=str(demo / "model"))
    hooked, stock = python(code), python(code, LLAMAFACTORY_KT_DISABLE="1")
    assert hooked.stdout.splitlines()[-1] == stock.stdout.splitlines()[-1], hooked.stderr


def train(tmp_path: Path, model: Path, use_kt: bool = False, **environment: str) -> subprocess.CompletedProcess:
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
        "report_to": "none", "logging_steps": 1, "learning_rate": 0.01, "use_cpu": True, "use_kt": use_kt,
        "overwrite_cache": True, "preprocessing_num_workers": 1,
    }  # fmt: skip
    return python(
        f"""
        from llamafactory.train.tuner import run_exp
        run_exp({arguments!r})
        import json
        print(json.dumps([r["loss"] for r in json.load(open({str(output)!r} + "/trainer_state.json"))["log_history"] if "loss" in r]))
        """,
        **environment,
    )


def test_training_is_unchanged(tmp_path):
    model = make_model(tmp_path / "model", "qwen3_moe")
    hooked, stock = train(tmp_path, model), train(tmp_path, model, LLAMAFACTORY_KT_DISABLE="1")
    assert hooked.returncode == stock.returncode == 0, hooked.stderr[-3000:]
    losses = json.loads(hooked.stdout.splitlines()[-1])
    assert len(losses) == 2 and losses == json.loads(stock.stdout.splitlines()[-1])
    refused = [train(tmp_path, model, use_kt=True, **env) for env in ({}, {"LLAMAFACTORY_KT_DISABLE": "1"})]
    assert all("transformers-kt" in result.stderr for result in refused), (
        "training with use_kt is LLaMA-Factory's own affair"
    )
