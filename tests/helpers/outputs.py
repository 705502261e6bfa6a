"""The example outputs in the documentation: the commands that they come from, run on the demo's model.

A page names an output in a comment before its block, ``<!-- output: verify -->``. ``make docs ARGS=--write-outputs`` writes the blocks
that have changed, and the picture of a terminal.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from llamafactory_kt.tools.bench.shapes import parse_shape

from .children import child
from .places import DEMO, ROOT
from .recording import echoed, picture, recorded, text_of

BLOCK = re.compile(r"(<!-- output: ([\w ]+) -->\n```\w*\n)(.*?)(^```$)", re.M | re.S)
"""a block in a page: what stands before it, its name, its text, its end"""
PICTURE = ROOT / "docs" / "images" / "terminal.svg"
QUESTIONS = ["/stats", "Hello, who are you?", "/load examples/demo/adapter", "Hello, who are you?", "Tell me a joke."]
"""of the picture"""
_BORDER = re.compile(r"^[┌┐└┘├┤┬┴┼─┏┓┗┛┡┩┳┻╇━]+$")
_FIGURE = r"\d[\d.]*"


@dataclass(frozen=True)
class Output:
    """One block.

    Args:
        command: what is typed; with ``$ `` before it, the block shows it.
        keep: of what the command prints, what the block has.
        varies: what differs between two machines, or two runs.
    """

    command: str
    keep: Callable[[str], str] = str.strip
    varies: tuple[str, ...] = ()

    def block(self, printed: str) -> str:
        shown = f"{self.command}\n" if self.command.startswith("$ ") else ""
        return shown + "\n".join(line.rstrip() for line in self.keep(printed).splitlines()) + "\n"

    def compared(self, text: str) -> str:
        """Without what varies, and without the widths of columns, which depend on it."""
        for pattern in self.varies:
            text = re.sub(pattern.replace(" ", r"\s*"), "#", text)
        lines = (re.sub(r" +", " ", line).rstrip() for line in text.splitlines())
        return "\n".join(line for line in lines if not _BORDER.match(line))


def _between(first: str, last: str) -> Callable[[str], str]:
    """The lines from the first that begins so to the next that begins so."""

    def keep(text: str) -> str:
        found = re.search(rf"^(?:{first}).*?^(?:{last})[^\n]*", text, re.M | re.S)
        assert found, f"no lines from {first!r} to {last!r} in\n{text}"
        return found[0]

    return keep


def _from(beginning: str) -> Callable[[str], str]:
    """The rest of a line, from what begins so."""
    return lambda text: next(iter(re.findall(rf"{beginning}.*", text)), text)


def _log(text: str) -> str:
    """What the log of a load says of the model and its adapter, without who says it."""
    text = text.partition("\nWelcome to")[0]
    lines = re.findall(
        r"^\[INFO\|[^]]*\] \S+ >> ((?:Load|KT mode|all params).*)|^(KTransformers experts) *$", text, re.M
    )
    return "\n".join(f"{title}\n..." if title else line for line, title in lines)


def _terminal(text: str) -> str:
    """Up to the last answer, without progress bars."""
    text = _between(r"\[INFO", r"(?=\nUser: /experts)")(text)
    return re.sub(r"^Loading (?:weights|experts): .*\n", "", text, flags=re.M)


def _structure(text: str) -> str:
    """With two of the parameters, and the beginning of PEFT's configuration."""
    text = _between("={60}\nDEBUG", "PEFT config.*\n={60}")(text)
    text = re.sub(r"((?:^  base_model.*\n){2})(?:^  base_model.*\n)+", r"\1  ...\n", text, flags=re.M)
    return re.sub(r"(task_type='CAUSAL_LM', ).*", r"\1...)}", text)


def _doctor(text: str) -> str:
    """Without what this machine lacks."""
    findings = re.findall(r"^\w.*(?:\n +→.*)?", text, re.M)
    return "\n".join(found for found in findings if re.match(r"error|warning +KMP|\d", found))


_SPEEDS = (rf"after {_FIGURE} s\b", rf"at {_FIGURE} tokens/s")
_LOADED = (
    r"on (?:amx|avx)\w*",
    rf"up to {_FIGURE} GiB",
    r"torch \d+ ",
    r", which take turns over the NUMA nodes [\d, ]*",
)
_BASE, _DEBUG = "llamafactory-cli chat base.yaml", "llamafactory-cli chat chat.yaml kt_debug=true"
OUTPUTS = {
    "terminal": Output(_BASE, _terminal, (*_LOADED, *_SPEEDS, r"\[INFO[^>]*>>")),
    "experts": Output(_BASE, _between("Experts: ", "└"), (_FIGURE,)),
    "log": Output(_DEBUG, _log),
    "load table": Output(_DEBUG, _between("KTransformers experts", "└"), _LOADED),
    "structure": Output(_DEBUG, _structure),
    "scope": Output("llamafactory-cli chat chat.yaml kt_lora_scope=attention", _from("kt_lora_scope: ")),
    "inspect": Output("$ llamafactory-kt inspect examples/demo/adapter"),
    "values": Output("llamafactory-kt inspect examples/demo/adapter --values", _between("‖ΔW‖ of", "└")),
    "verify": Output("$ llamafactory-kt verify chat.yaml", _between("┏", r"All \d+ other"), (r"(?<=│).*(?=│ right)", r"worst: layer \d")),
    "doctor": Output("$ llamafactory-kt doctor mistakes.yaml", _doctor, (r"\d+ warning", r"\d+ in order")),
    "estimate": Output("$ llamafactory-kt estimate Qwen3-30B-A3B"),
    "merge": Output("llamafactory-kt merge --model examples/demo/model --adapter examples/demo/adapter --output merged"),
    "convert": Output("$ llamafactory-kt convert --input my_adapter --output moe_lora.pt"),
}  # fmt: skip

_CHILD = """
import json, os, signal, sys

os.environ.pop("LLAMAFACTORY_VERBOSITY", None)
os.environ["KMP_BLOCKTIME"] = "0"  # what doctor finds
import llamafactory.chat, llamafactory.cli, llamafactory_kt.cli
from helpers import outputs
from llamafactory_kt.tools import doctor, estimate, merge, verify

os.chdir(sys.argv[1])
for number, words in enumerate(json.loads(sys.argv[2])):  # a process each, of one that has imported all that they need
    if process := os.fork():
        os.waitpid(process, 0)
        continue
    signal.alarm(300)
    for stream, name in ((1, f"{number}.out"), (2, f"{number}.out"), (0, "stdin")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    outputs.pretend()
    sys.argv = words
    main = llamafactory_kt.cli.main if words[0] == "llamafactory-kt" else llamafactory.cli.main
    try:
        main()
    except SystemExit:
        pass
    except BaseException as error:
        print(repr(error))  # among the differences
    sys.stdout.flush()
    os._exit(0)
"""


def made(directory: Path) -> dict[str, str]:
    """Each output's block, and the text of the picture under ``terminal``, from runs in an empty directory."""
    write_files(directory)
    commands = list(dict.fromkeys(output.command for output in OUTPUTS.values()))
    words = json.dumps([shlex.split(command.removeprefix("$ ")) for command in commands])
    result = child(_CHILD, directory, words, CUDA_VISIBLE_DEVICES="")
    assert not result.returncode, result.stderr
    printed = {command: (directory / f"{number}.out").read_text("utf-8") for number, command in enumerate(commands)}
    printed[_BASE] = echoed(printed[_BASE], [*QUESTIONS, "/experts"])
    return {name: output.block(printed[output.command]) for name, output in OUTPUTS.items()}


def write_files(directory: Path) -> Path:
    """What the commands take; returns the configuration of the terminal's chat."""
    (directory / "examples").mkdir()
    (directory / "examples" / "demo").symlink_to(DEMO)
    (directory / "my_adapter").symlink_to(DEMO / "adapter")
    (directory / "stdin").write_text("\n".join([*QUESTIONS, "/experts"]) + "\n", "utf-8")
    base = {"model_name_or_path": "examples/demo/model", "template": "deepseek", "use_kt": True, "kt_backend": "native", "do_sample": False}  # fmt: skip
    chat = {**base, "adapter_name_or_path": "examples/demo/adapter"}
    mistakes = {**base, "max_new_token": 64, "kt_bakend": "native"}
    for name, keys in {"base": {**base, "kt_router_stats": True}, "chat": chat, "mistakes": mistakes}.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(keys), "utf-8")
    values = parse_shape("qwen3-30b-a3b").values
    (directory / "Qwen3-30B-A3B").mkdir()
    configuration = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", **values}
    (directory / "Qwen3-30B-A3B" / "config.json").write_text(json.dumps(configuration), "utf-8")
    return directory / "base.yaml"


def pretend() -> None:
    """In a child: have the machine that the page of estimates names, and imports that doctor need not try."""
    from llamafactory_kt.tools.bench.speed import Speed
    from llamafactory_kt.tools.doctor import packages
    from llamafactory_kt.tools.estimate import run, speed

    kernels = {16: Speed(30e9, 391e9), 8: Speed(32e9, 351e9), 4: Speed(31e9, 345e9)}
    run.machine_speed = lambda measure_again: speed.MachineSpeed("AMD EPYC", 2, 63e9, 387e9, kernels)
    run.available_memory, run.cgroup_memory = lambda: int(22.6 * 2**30), lambda: int(23.5 * 2**30)
    packages.try_imports = lambda: packages.Imports({}, frozenset())
    packages.hooks = list


def differences(page: Path, found: dict[str, str]) -> dict[str, str]:
    """Blocks of a page that say something else than what was made: name -> both."""
    different = {}
    for _, name, shown, _ in BLOCK.findall(page.read_text("utf-8")):
        output = OUTPUTS[name]
        if output.compared(shown) != output.compared(found[name]):
            different[name] = f"the page has\n{shown}\nthe command prints\n{found[name]}"
    return different


def write(page: Path, found: dict[str, str]) -> None:
    """Put what was made in the place of those blocks."""
    changed = differences(page, found)
    text = page.read_text("utf-8")
    text = BLOCK.sub(lambda match: match[1] + (found[match[2]] if match[2] in changed else match[3]) + match[4], text)
    page.write_text(text, "utf-8")


def picture_differs(found: dict[str, str]) -> str:
    """Both texts, if the picture says something else than the chat."""
    shown, output = PICTURE.read_text("utf-8") if PICTURE.exists() else "", OUTPUTS["terminal"]
    texts = [re.sub(r"\s", "", output.compared(text)) for text in (text_of(shown), found["terminal"])]
    return "" if texts[0] == texts[1] else "\n".join(texts)


def take_picture(directory: Path) -> None:
    """Record a chat in a terminal."""
    session = OUTPUTS["terminal"].block(recorded(write_files(directory), [*QUESTIONS, "/experts"]))
    PICTURE.write_text(picture(session, "llamafactory-cli chat chat.yaml"), "utf-8")
