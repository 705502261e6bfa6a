"""The load table on a page, in its language. Logs have it in English, so the Chinese rows keep their English names beside them."""

from __future__ import annotations

import re

from ...load_report import TITLE, Rows, load_markdown

ROWS = {
    "Layers wrapped": "由引擎计算的层",
    "Layer kinds": "层的种类",
    "Engine": "引擎",
    "Native kernels": "原生内核",
    "Weights": "权重",
    "Linear layers": "linear 层",
    "Keys and values": "key 和 value",
    "Earlier prompts": "之前的提示词",
    "Threads": "线程",
    "Chosen because": "选择依据",
    "Memory on CPU": "CPU 内存",
    "Memory on GPU": "GPU 显存",
    "Experts on GPU": "GPU 上的专家",
    "Adapters": "可选的 adapter",
    "LoRA tensors": "LoRA 张量",
    "LoRA layers": "LoRA 层",
    "Parameters": "参数量",
    "LoRA parameters": "LoRA 参数量",
}
_PHRASES = tuple(
    (re.compile(english), chinese)
    for english, chinese in (
        (r"^none$", "无"),
        (r"^none: (.*)", r"无：\1"),
        (r"^(\S+) on (\S+)$", r"\1（\2）"),
        (r", dense MLP ", "，稠密 MLP "),
        (r"quantized before, in (.*), (?=copied|mapped)", r"事先量化，在 \1，"),
        (r"(\S+) as the checkpoint has them, ", r"\1，与检查点相同，"),
        (r"copied into huge pages", "复制到大页"),
        (r", which take turns over the NUMA nodes (.*)", r"，轮流放在 NUMA 节点 \1 上"),
        (r"mapped from its files", "从其中的文件映射"),
        (r"mapped from the checkpoint's files", "从检查点文件映射"),
        (r", and larger than the (.*) that are free: tokens wait for the disk", r"，大于空闲的 \1：每个 token 都要等磁盘"),
        (r"^(\d+) as (\w+), with a scale for each (\d+) weights", r"\1 个，存为 \2，每 \3 个权重一个 scale"),
        (r", (\d+) of them quantized before", r"，其中 \1 个事先量化"),
        (r"(\d+) bits, with a scale for each head of a token", r"\1 位，每个 token 的每个头一个 scale"),
        (r"latents, which stay as they are", "latent，保持原样"),
        (r"kept for the next ones, up to (.*) of keys and values", r"留给之后的提示词，key 和 value 最多 \1"),
        (r"kt-kernel (.*) in (\d+) sub-pool\(s\)", r"kt-kernel \1，\2 个子线程池"),
        (r"; torch ", "；torch "),
        (r"small layers, not measured", "层很小，未实测"),
        (r"(\S+) cannot run: this CPU lacks (.*), which kt-kernel's kernels need", r"\1 不能运行：CPU 没有 kt-kernel 内核需要的 \2"),
        (r" \(experts ", "（专家 "),
        (r", their LoRA ", "，其 LoRA "),
        (r", other (.*)\)$", r"，其余 \1）"),
        (r" and experts ", " 以及专家 "),
        (r"(\d+) of each of (\d+) layers, the most used of (\d+) tokens", r"\2 层，每层 \1 个，是 \3 个 token 用得最多的"),
        (r"(\d+) of each of (\d+) layers, the first; after (\d+) tokens the most used", r"\2 层，每层前 \1 个；\3 个 token 之后换成用得最多的"),
        (r", to choose from; below, what is applied now", "；以下各行是现在用的 adapter"),
        (r"^no adapter$", "没有 adapter"),
        (r"consumed (\d+) of (\d+) \(PEFT (\d+), KT experts (\d+)\)", r"已使用 \1 / \2（PEFT \3，KT 专家 \4）"),
        (r"(\d+) with expert LoRA, rank up to (\d+)", r"\1 层的专家有 LoRA，秩最大为 \2"),
        (r", merged into the weights", "，已合并进权重"),
        (r"(torch|PEFT) ([\d,]+), KT experts ", r"\1 \2，KT 专家 "),
    )
)  # fmt: skip


def markdown(rows: Rows, language: str | None) -> str:
    """The table as a page shows it.

    >>> print(markdown([("Engine", "native on avx2")], "zh"))
    | KTransformers 专家 | |
    |---|---|
    | 引擎 (Engine) | native（avx2） |
    """
    return load_markdown(in_language(rows, language), "KTransformers 专家" if language == "zh" else TITLE)


def in_language(rows: Rows, language: str | None) -> Rows:
    """The rows as a page shows them.

    >>> in_language([("Engine", "native on avx2"), ("LoRA tensors", "no adapter")], "zh")
    [('引擎 (Engine)', 'native（avx2）'), ('LoRA 张量 (LoRA tensors)', '没有 adapter')]
    >>> in_language([("Engine", "native on avx2")], "ko")
    [('Engine', 'native on avx2')]
    """
    if language != "zh":
        return rows
    return [(f"{ROWS[name]} ({name})", _translated(value)) for name, value in rows]


def _translated(value: str) -> str:
    for english, chinese in _PHRASES:
        value = english.sub(chinese, value)
    return value
