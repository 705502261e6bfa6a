"""The documentation: its links, its two languages, and its examples, which are run."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import typer.main
import yaml
from helpers import outputs
from helpers.machines import pretend_any_machine
from helpers.marks import needs_native
from helpers.places import ROOT

import llamafactory_kt
from llamafactory_kt.cli import app
from llamafactory_kt.engines.native import NativeEngine

PAGES = [ROOT / "README.md", ROOT / "README_zh.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ENGLISH = [page for page in PAGES if not page.stem.endswith("_zh") and page.stem != "CONTRIBUTING"]
SOURCE_NAMES = {
    name
    for file in (*(ROOT / "llamafactory_kt").rglob("*.py"), *(ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"\b(?:kt_[a-z0-9_]+|(?:LLAMAFACTORY_)?KT_[A-Z_]+)\b", file.read_text("utf-8"))
}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def chinese(page: Path) -> Path:
    return page.with_stem(f"{page.stem}_zh")


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in _FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def headings(page: Path) -> list[tuple[int, str]]:
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", prose(page), re.M)]


def anchor(title: str) -> str:
    """As GitHub makes them: lower case, without punctuation, with hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(title) for _, title in headings(page)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    assert targets
    for target in targets:
        if target.startswith(("http://", "https://")):
            continue
        name, _, section = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists() and (ROOT in file.parents or file == ROOT), f"{page.name}: {target} leads nowhere"
        if section:
            assert section in anchors(file), f"{page.name}: {target}: {sorted(anchors(file))}"


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.name)
def test_both_languages(page):
    """The same headings, and the same examples except for comments."""
    other = chinese(page)
    assert [level for level, _ in headings(page)] == [level for level, _ in headings(other)]

    def code(of: Path) -> list[str]:
        text = "\n".join(block for language in ("bash", "python", "yaml") for block in blocks(of, language))
        text = re.sub(r'"[^"\n]*"', '""', text)  # people ask in their own language
        return [bare for line in text.splitlines() if (bare := re.sub(r"(^|\s)#.*$", "", line).rstrip())]

    assert code(page) == code(other)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.name)
def test_contents(page):
    """Who reads the page as a plain file finds all of its sections linked before the first one."""
    head = prose(page).partition("\n## ")[0]
    sections = [f"[{title}](#{anchor(title)})" for level, title in headings(page) if level == 2]
    assert not [link for link in sections if link not in head], f"Contents: {' · '.join(sections)}"


def test_the_website_has_every_page():
    """In its navigation; what else can break is found by make site."""
    site = runpy.run_path(str(ROOT / "website" / "pages.py"))
    found = [file for patterns in site["NAV"].values() for pattern in patterns for file in ROOT.glob(pattern)]
    wanted = {*ENGLISH, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "benchmarks").glob("*.md")}
    assert sorted(found) == sorted(wanted)


def test_every_page_can_be_found():
    """Both READMEs link to all pages."""
    for readme in (ROOT / "README.md", ROOT / "README_zh.md"):
        linked = set(re.findall(r"\]\(docs/([\w-]+)\.md", readme.read_text(encoding="utf-8")))
        pages = ENGLISH if readme.stem == "README" else [chinese(page) for page in ENGLISH]
        assert {page.stem for page in pages if page.parent.name == "docs"} <= linked


def commands() -> list[str]:
    """Every command line of ours in the documentation, with continued lines joined."""
    found = {
        line.strip().removeprefix("$ ")
        for page in ENGLISH
        for language in ("bash", "")
        for block in blocks(page, language)
        for line in block.replace("\\\n", " ").splitlines()
        if re.match(r"(\$ )?llamafactory-kt ", line.strip())
    }
    return sorted(found)


@pytest.mark.parametrize("line", commands())
def test_commands(line):
    """The command line has each command, each option and each argument."""
    words = shlex.split(line, comments=True)
    for end in ("&&", "||", ">", "|"):
        words = words[: words.index(end)] if end in words else words
    command, name = typer.main.get_command(app), words.pop(0)
    context = command.context_class(command, info_name=name)
    while hasattr(command, "commands"):
        name = words.pop(0)
        command = command.get_command(context, name)
        assert command is not None, f"no command {name}"
        if hasattr(command, "commands"):
            context = command.context_class(command, info_name=name, parent=context)
    command.make_context(name, words, parent=context)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """The directory of a reader who has followed the pages: examples, a configuration, prompts."""
    directory = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", directory / "examples")
    for name, target in (("my_adapter", "adapter"), ("my_model", "model"), ("DeepSeek-V2-Lite-Chat", "model"), ("Qwen3-VL-30B-A3B-Instruct", "model"), ("Kllama_deepseekV2", "adapter")):  # fmt: skip
        (directory / name).symlink_to(ROOT / "examples" / "demo" / target)
    for name in ("int4", "amxint8"):
        (directory / f"dsv2-lite-{name}").mkdir()
    keys = {"model_name_or_path": "examples/demo/model", "template": "deepseek", "use_kt": True, "kt_backend": "torch"}
    (directory / "chat.yaml").write_text(yaml.safe_dump(keys))
    return directory


def localised(text: str, directory: Path) -> str:
    """Replace invented places by places that exist."""
    text = text.replace("deepseek-ai/DeepSeek-V2-Lite-Chat", f"{directory}/my_model")
    text = text.replace("/opt/sglang/bin/python", sys.executable)
    return re.sub(r"/(models|saves)/", f"{directory}/", text)


YAMLS = [(page, number) for page in ENGLISH for number, _ in enumerate(blocks(page, "yaml"))]


@pytest.mark.parametrize(("page", "number"), YAMLS, ids=[f"{page.name}-{number}" for page, number in YAMLS])
def test_yaml(reader, page, number, monkeypatch):
    """Goes through LLaMA-Factory's parser and our checks. Whether this machine could run it does not matter."""
    from llamafactory_kt.integration.chat_config import parse

    pretend_any_machine(monkeypatch)
    monkeypatch.chdir(reader)
    values = yaml.safe_load(localised(blocks(page, "yaml")[number], reader))
    sweep = values.pop("sweep", {})
    values = {"model_name_or_path": "my_model", "template": "deepseek", "use_kt": True, **values}
    args = parse({**values, **{key: choices[-1] for key, choices in sweep.items()}})
    assert args.use_kt and args.kt_inference


ILLUSTRATIONS = ("WARNING:llamafactory_kt.tools.convert", "export_dir: ", "/opt/sglang/bin/python -m")
"""blocks that nothing here prints: other adapters, other machines"""


@needs_native
def test_outputs(request, tmp_path):
    """Example outputs are what the commands print. What varies between machines and runs may differ."""
    found = outputs.made(tmp_path)
    if request.config.getoption("--write-outputs"):
        for page in PAGES:
            outputs.write(page, found)
        if outputs.picture_differs(found):
            (tmp_path / "recorded").mkdir()
            outputs.take_picture(tmp_path / "recorded")
    wrong = {f"{page.name}, {name}": both for page in PAGES for name, both in outputs.differences(page, found).items()}
    if both := outputs.picture_differs(found):
        wrong[outputs.PICTURE.name] = both
    for page in PAGES:
        text = outputs.BLOCK.sub("", page.read_text(encoding="utf-8"))
        for block in (text for language, text in _FENCE.findall(text) if not language):
            if not block.startswith(ILLUSTRATIONS):
                wrong[f"{page.name}: a block that no command makes"] = block
    assert not wrong, "\n\n".join(f"{name}:\n{both}" for name, both in wrong.items())
    used = [{name for _, name, _, _ in outputs.BLOCK.findall(page.read_text("utf-8"))} for page in PAGES]
    assert set.union(*used) | {"terminal"} == set(outputs.OUTPUTS)


EXAMPLES = sorted((ROOT / "examples" / "ktransformers").rglob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_configurations(path, reader, monkeypatch):
    from llamafactory_kt.integration.chat_config import parse, read_yaml

    pretend_any_machine(monkeypatch)
    values = read_yaml(path)
    if "adapter_name_or_path" in values:
        values["adapter_name_or_path"] = str(reader / "my_adapter")
    assert parse({**values, "model_name_or_path": str(reader / "my_model")}).use_kt


def test_make_targets():
    """The Makefile has the targets that pages and workflows call, each with a line for `make help`."""
    targets = set(re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.M))
    workflows = [*(ROOT / ".github" / "workflows").glob("*.yml")]
    steps = [
        step for file in workflows for job in yaml.safe_load(file.read_text())["jobs"].values() for step in job["steps"]
    ]
    called = [step["run"].split()[1] for step in steps if "run" in step]
    assert {"setup", "lint", "types", "docs", "site", "test", "soak"} == set(called)
    for page in PAGES:
        called += re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.M)
    assert set(called) <= targets


def test_names_of_tests():
    """The tests that pages name as evidence exist."""
    known = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    for page in PAGES:
        assert set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))) <= known, page.name


PYTHON = [page for page in ENGLISH if blocks(page, "python")]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python(page, reader, monkeypatch, capsys):
    """A page's blocks are run one after the other in one namespace. A comment after print() is what gets printed."""
    monkeypatch.chdir(reader)
    names: dict[str, object] = {"__name__": "example"}
    if page.stem == "experiments":  # which speaks of a model that counts
        from transformers import AutoModelForCausalLM

        config = llamafactory_kt.KTExpertsConfig(backend="torch", router_stats=True)
        names["model"] = AutoModelForCausalLM.from_pretrained("my_model", quantization_config=config)
    if page.stem == "quantize" and (problem := NativeEngine.problem()):
        pytest.skip(problem)
    text = "\n".join(blocks(page, "python"))
    shutil.rmtree("merged", ignore_errors=True)
    exec(compile(localised(text, reader), page.name, "exec"), names)
    said = capsys.readouterr().out
    for wanted in re.findall(r"^print\(.*\)  # (.+)$", text, re.M):
        assert wanted in said


@pytest.mark.parametrize("page", [ROOT / "docs" / "python.md", ROOT / "docs" / "python_zh.md"], ids=lambda p: p.name)
def test_exported_names(page):
    """The page has a row for each exported name, and no others."""
    rows = re.findall(r"^\| `(\w+)(?:\(.*?\))?` \|", page.read_text(encoding="utf-8"), re.M)
    assert sorted(rows) == sorted(set(llamafactory_kt.__all__))
    for name in rows:
        assert getattr(llamafactory_kt, name) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names(page):
    """Keys and environment variables that a page names are in the sources, and files are there."""
    text = page.read_text(encoding="utf-8")
    assert {name for name in re.findall(r"\b(?:kt_[a-z0-9_]+|(?:LLAMAFACTORY_)?KT_[A-Z_]+)\b", text)} <= SOURCE_NAMES
    for path in re.findall(r"`((?:llamafactory_kt|tests|examples|docs|benchmarks)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name}: {path} is not there"


def test_load_table():
    """The guides explain each row of the load table, and no others, in its order; the page has a Chinese name for each."""
    from llamafactory_kt.integration.webui.load_table import ROWS

    source = (ROOT / "llamafactory_kt" / "load_report.py").read_text()
    rows = re.findall(r'\(\s*"([A-Z][\w ]+)", ', source.partition("def load_table")[0])
    for page in (ROOT / "docs" / "chat-guide.md", ROOT / "docs" / "chat-guide_zh.md"):
        table = re.search(
            r"<!-- output: load table -->.*?\n\|[^\n]*\n\|---\|---\|\n(.*?)\n\n", page.read_text("utf-8"), re.S
        )[1]
        assert re.findall(r"^\| ([\w ]+) \|", table, re.M) == rows == list(ROWS)
