"""The texts of our parts of LLaMA-Factory's pages, in English and Chinese; other languages get English."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .advice import advice

COMPONENTS: dict[str, dict[str, dict[str, str]]] = {
    "kt_section": {
        "en": {"label": "KTransformers (MoE experts on the CPU)"},
        "zh": {"label": "KTransformers（MoE 专家在 CPU 上计算）"},
    },
    "use_kt": {
        "en": {"label": "Use KTransformers", "info": "Compute the routed experts on the CPU."},
        "zh": {"label": "启用 KTransformers", "info": "在 CPU 上计算路由专家。"},
    },
    "kt_backend": {
        "en": {"label": "Expert engine", "info": "auto: the fastest that keeps all bits, measured once."},
        "zh": {"label": "专家引擎", "info": "auto：不损失精度的引擎中实测最快的一个。"},
    },
    "kt_num_threads": {
        "en": {"label": "Threads", "info": "kt-kernel's worker threads. auto: the fastest number measured."},
        "zh": {"label": "线程数", "info": "kt-kernel 的工作线程数。auto：取实测最快的线程数。"},
    },
    "kt_threadpool_count": {
        "en": {"label": "Sub-pools", "info": "At most one per NUMA node."},
        "zh": {"label": "子线程池数", "info": "每个 NUMA 节点最多一个。"},
    },
    "kt_weight_path": {
        "en": {
            "label": "Quantized weights",
            "info": "Directory that llamafactory-kt quantize has made. Required for AMXINT8, optional for INT8, INT4 and AMXINT4.",
        },
        "zh": {
            "label": "量化好的权重",
            "info": "llamafactory-kt quantize 生成的目录。AMXINT8 必填，INT8、INT4、AMXINT4 可选。",
        },
    },
    "kt_lora_scope": {
        "en": {"label": "LoRA scope", "info": "attention: leaves out shared experts and dense layers."},
        "zh": {"label": "LoRA 范围", "info": "attention：不含共享专家和稠密层。"},
    },
    "kt_router_stats": {
        "en": {"label": "Router statistics", "info": "Count how often each expert is used, and draw a heat map."},
        "zh": {"label": "统计路由", "info": "统计各专家的使用情况并画成热力图。"},
    },
    "kt_debug": {
        "en": {"label": "Debug mode", "info": "Log each step; stop at the first NaN or Inf."},
        "zh": {"label": "调试模式", "info": "记录每一步；一出现 NaN 或 Inf 就停止。"},
    },
    "kt_names": {
        "en": {
            "value": "Other fields by their names in a YAML: Model path is `model_name_or_path`, Checkpoint path `adapter_name_or_path`, "
            "Chat template `template`, Inference engine `infer_backend`. All other keys go into Extra arguments."
        },
        "zh": {
            "value": "其他各项在 YAML 里的名字：模型路径是 `model_name_or_path`，检查点路径是 `adapter_name_or_path`，对话模板是 `template`，"
            "推理引擎是 `infer_backend`。其余参数都写在“额外参数”里。"
        },
    },
    "kt_report": {"en": {"label": "Load report"}, "zh": {"label": "加载报告"}},
    "kt_fill": {
        "en": {"value": "Set the form to what is loaded"},
        "zh": {"value": "把表单恢复为已加载的设置"},
    },
    "kt_stop": {"en": {"value": "Stop"}, "zh": {"value": "停止"}},
    "kt_again": {"en": {"value": "Regenerate"}, "zh": {"value": "重新生成"}},
    "kt_edit": {"en": {"value": "Edit last question"}, "zh": {"value": "修改上一个问题"}},
    "kt_heat_map": {"en": {"label": "Router statistics"}, "zh": {"label": "路由统计"}},
    "kt_reset": {"en": {"value": "Count anew"}, "zh": {"value": "重新统计"}},
}
"""elements of the page as in LLaMA-Factory's ``LOCALES``: name -> language -> properties"""

MESSAGES: dict[str, dict[str, str]] = {
    "experts": {
        "en": "Loading the experts: layer {layer} of {layers} · {read} of {total} · {speed}/s · {seconds:.0f} s",
        "zh": "正在加载专家：第 {layer} 层，共 {layers} 层 · 已读 {read}，共 {total} · {speed}/s · {seconds:.0f} 秒",
    },
    "measuring": {
        "en": "Measuring engines: {plan} of {plans}, once for this machine... {seconds:.0f} s",
        "zh": "正在测量引擎：{plan} / {plans}，这台机器只测一次……{seconds:.0f} 秒",
    },
    "can_stop": {"en": " · “{button}” stops it", "zh": " · 点“{button}”可停止"},
    "waiting": {"en": "{before} {seconds:.0f} s", "zh": "{before}{seconds:.0f} 秒"},
    "switching": {"en": "Exchanging the adapter...", "zh": "正在切换 adapter……"},
    "switched": {"en": "Adapter exchanged; the model stayed loaded.", "zh": "adapter 已切换，模型没有重新加载。"},
    "failed": {"en": "The model was not loaded. {error}", "zh": "模型未能加载。{error}"},
    "not_switched": {
        "en": "The adapter was not exchanged; the previous one is still in place. {error}",
        "zh": "adapter 未能切换，原来的 adapter 仍然生效。{error}",
    },
    "stopping_load": {
        "en": "Stopping the load, after what is being read or measured…",
        "zh": "正在停止加载，等当前的读取或测量结束……",
    },
    "load_stopped": {"en": "The load was stopped.", "zh": "加载已停止。"},
    "loaded_so": {
        "en": "The model is already loaded as it is set here.",
        "zh": "模型已经按这里的设置加载。",
    },
    "changed": {"en": ", with another {keys}", "zh": "，当时的 {keys} 与现在不同"},
    "offer": {
        "en": "{loaded} is still loaded{changed}. Press “{button}” again to unload it and load {wanted} as it is set here.",
        "zh": "{loaded} 仍在内存里{changed}。再点一次“{button}”，就会卸载它，并按这里的设置加载 {wanted}。",
    },
    "gone": {
        "en": "The model was unloaded, in another tab or by another user. Load one, then ask again.",
        "zh": "模型已在另一个标签页或由其他用户卸载。请重新加载后再提问。",
    },
    "placeholder": {
        "en": "Ask something. Enter sends it, Shift+Enter starts a new line.",
        "zh": "请输入问题。按 Enter 发送，按 Shift+Enter 换行。",
    },
    "begun": {"en": "Waiting for the model…", "zh": "等待模型……"},
    "in_line": {
        "en": "Waiting in line: the model answers others first ({ahead}).",
        "zh": "排队等待：模型先回答前面的提问（{ahead} 个）。",
    },
    "in_line_short": {"en": "waiting in line…", "zh": "正在排队……"},
    "stopped": {"en": " · stopped", "zh": " · 已停止"},
    "stopped_early": {"en": "Stopped before the first word.", "zh": "尚未开始回答就已停止。"},
    "not_answered": {"en": "Not answered.", "zh": "没有得到回答。"},
    "cut": {"en": " · cut at the maximum of new tokens", "zh": " · 达到最大生成长度，已截断"},
    "adapters": {"en": "adapter {names}", "zh": "adapter：{names}"},
    "no_adapter": {"en": "no adapter", "zh": "无 adapter"},
    "engine": {"en": "engine {name}", "zh": "引擎：{name}"},
    "speed": {"en": "{speed:.1f} tokens/s", "zh": "{speed:.1f} token/s"},
    "context": {"en": "context {used} of {whole} tokens", "zh": "上下文已用 {used} / {whole} 个 token"},
    "context_over": {
        "en": "<b>context {used} tokens, more than the model's {whole}: clear the history</b>",
        "zh": "<b>上下文已用 {used} 个 token，超出模型的 {whole} 个：请清空历史</b>",
    },
    "context_used": {"en": "context {used} tokens", "zh": "上下文已用 {used} 个 token"},
    "answering": {"en": "answering…", "zh": "正在回答……"},
    "uncounted": {"en": "No answers counted yet.", "zh": "还没有统计到任何回答。"},
    "map_axes": {"en": "Rows: layers, columns: experts", "zh": "行：层，列：专家"},
    "map_summary": {
        "en": "This conversation: {tokens} tokens, {answers} of them in answers.",
        "zh": "本次对话：{tokens} 个 token，其中 {answers} 个在回答里。",
    },
    "map_total": {"en": " All conversations: {total} tokens.", "zh": "全部对话：{total} 个 token。"},
    "map_point": {"en": "Point at a cell to see its figures.", "zh": "把指针移到格子上，即可查看数值。"},
    "map_cell": {
        "en": "layer {layer}, expert {expert}: {tokens} tokens, {balance} × the layer's mean",
        "zh": "第 {layer} 层，专家 {expert}：{tokens} 个 token，为该层平均值的 {balance} 倍",
    },
    "map_scale": {"en": "tokens / mean of the layer: ", "zh": "token 数 / 该层平均值："},
    "reading": {
        "en": "Reading the prompt: {read} of {prompt} tokens",
        "zh": "正在读取提示词：{read} / {prompt} 个 token",
    },
    "kept": {"en": " ({cached} kept from earlier)", "zh": "（其中 {cached} 个沿用之前的结果）"},
    "figures": {
        "en": "{speed:.1f} tokens/s · prompt {prompt} tokens{kept} · first token after {first:.2f} s · answer {answer} tokens",
        "zh": "{speed:.1f} token/s · 提示词 {prompt} 个 token{kept} · 首个 token 用时 {first:.2f} 秒 · 回答 {answer} 个 token",
    },
}


def add_components(locales: dict[str, Any], languages: Iterable[str]) -> None:
    """Add :data:`COMPONENTS` to LLaMA-Factory's ``LOCALES``, which its language switch reads."""
    for name, texts in COMPONENTS.items():
        named = {language: _with_key(name, properties) for language, properties in texts.items()}
        locales[name] = {language: named.get(language, named["en"]) for language in languages}


def _with_key(name: str, properties: dict[str, str]) -> dict[str, str]:
    """A field for a key also says what the key is called in a YAML."""
    return properties | {"label": f"{properties['label']} ({name})"} if "info" in properties else properties


_FIELDS = {
    "model_name_or_path": "model_path", "adapter_name_or_path": "checkpoint_path", "template": "template",
    "infer_backend": "infer_backend",
}  # fmt: skip
"""keys that LLaMA-Factory's own fields set -> the fields"""


def in_page_words(error: str, language: str | None) -> str:
    """An error as a page shows it: with the names of its fields; on pages in Chinese, with what to do in Chinese."""
    shown = _with_fields(error, language or "en").split("\n")
    advised = map(advice if language == "zh" else lambda line: None, error.split("\n"))
    return "\n".join(f"{line}\n  → {what}" if what else line for line, what in zip(shown, advised, strict=True))


def _with_fields(error: str, language: str) -> str:
    """An error with the names of the page's fields beside those of their keys, once each."""
    from llamafactory.webui.locales import LOCALES

    for key, field in {
        **_FIELDS,
        **{name: name for name, texts in COMPONENTS.items() if "info" in texts["en"]},
    }.items():
        label = LOCALES[field][language]["label"].removesuffix(f" ({key})")
        # a word such as "template" also stands in sentences
        pattern = rf"\b{key}\b" if "_" in key else rf"(?m)(?<=^- )\b{key}(?=:)|^{key}(?=:)"
        if found := re.search(pattern, error):
            error = f"{error[: found.start()]}{label} ({key}){error[found.end() :]}"
    return error


def say(name: str, language: str | None, /, **values: Any) -> str:
    """One of :data:`MESSAGES`, filled with ``values``."""
    texts = MESSAGES[name]
    return texts.get(language or "en", texts["en"]).format(**values)


def is_said(name: str, language: str | None, /, text: str) -> bool:
    """Whether a text is one of :data:`MESSAGES`, with any values.

    >>> is_said("in_line", "en", say("in_line", "en", ahead=2)), is_said("in_line", "en", "Waiting in line.")
    (True, False)
    """
    texts = MESSAGES[name]
    return bool(
        re.fullmatch(re.sub(r"\\{.*?\\}", ".*", re.escape(texts.get(language or "en", texts["en"]))), text, re.S)
    )
