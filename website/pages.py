"""Lays out this clone's pages for the website: python website/pages.py, before mkdocs.

The site has two parts, English and Chinese, each with a search of its own. A page has the same address in both, and pages
that exist in English only are in both. Links to sources lead to pages that show them, as there may be no code host to link to.
"""

from __future__ import annotations

import os.path
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "website" / "pages"
SCRIPTS = Path(sys.prefix, "js")  # where `make site` puts what the theme would load from unpkg.com

NAV = {  # titles of pages are their headings
    ("Start", "开始"): ["README.md", "docs/questions.md"],
    ("Chatting", "对话"): [f"docs/{name}.md" for name in ("estimate", "chat-guide", "web-ui", "architectures", "quantize", "serving")],
    ("Solving problems", "解决问题"): [f"docs/{name}.md" for name in ("troubleshooting", "messages", "versions", "doctor", "faq")],
    ("Speed", "速度"): [f"docs/{name}.md" for name in ("tuning", "engines", "native-kernels", "bench")],
    ("Adapters", "Adapter"): [f"docs/{name}.md" for name in ("inspect", "convert", "merge")],
    ("Experiments and development", "实验与开发"): ["docs/experiments.md", "docs/python.md", "docs/how-it-is-built.md", "CONTRIBUTING.md", "CHANGELOG.md"],
    ("Benchmarks", "基准测试"): ["benchmarks/README.md", "benchmarks/2*.md"],
}  # fmt: skip

_FENCE = re.compile(r"^```.*?^```", re.M | re.S)
_LINK = re.compile(r"\[([^\[\]]*)\]\((?!\w+:)([^)\s#]*)(#[^)\s]+)?\)")


@dataclass(frozen=True)
class Language:
    code: str
    name: str
    suffix: str  # of the names of its pages
    folder: str  # on the site
    number: int  # among the names in NAV
    description: str
    palette: tuple[str, str, str]  # what a click on the switch of light and dark does


ENGLISH = Language("en", "English", "", "", 0, "Mixture-of-experts models in stock LLaMA-Factory, their experts on the CPU", ("Light", "Dark", "As the system"))  # fmt: skip
CHINESE = Language("zh", "中文", "_zh", "zh/", 1, "在原版 LLaMA-Factory 中运行 MoE 模型，专家在 CPU 上计算", ("浅色", "深色", "跟随系统"))  # fmt: skip


def anchor(heading: str, separator: str = "-") -> str:
    """As code hosts make them: lower case, without punctuation, with hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def anchors(page: str) -> list[str]:
    text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return [anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)]


def address(page: str) -> str:
    """Of a page on the site, still with .md, which mkdocs makes .html."""
    path = re.sub(r"(_zh)?\.md$", "", page.removeprefix("docs/"))
    return re.sub(r"README$", "index", path).lower() + ".md"


def in_language(page: str, language: Language) -> str:
    """The page in a language; the English one where there is no other."""
    twin = re.sub(r"(_zh)?\.md$", f"{language.suffix}.md", page)
    return twin if (ROOT / twin).is_file() else page


class Part:
    """The pages of one language."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self.folder = OUTPUT / language.code
        self.shown: set[str] = set()

    def write(self) -> None:
        nav: list[object] = []
        for names, patterns in NAV.items():
            pages = [file.relative_to(ROOT).as_posix() for pattern in patterns for file in sorted(ROOT.glob(pattern))]
            nav.append({names[self.language.number]: [self.page(in_language(page, self.language)) for page in pages]})
        shutil.copytree(ROOT / "docs" / "images", self.folder / "images")
        (OUTPUT / f"{self.language.code}.yml").write_text(yaml.safe_dump(self.settings(nav)), encoding="utf-8")

    def settings(self, nav: list[object]) -> dict[str, object]:
        """What mkdocs.yml does not say, as it depends on the language."""
        schemes = ("(prefers-color-scheme)", None), ("(prefers-color-scheme: light)", "default"), ("(prefers-color-scheme: dark)", "slate")  # fmt: skip
        icons = "brightness-auto", "brightness-7", "brightness-4"
        palette = [
            {"media": media, "toggle": {"icon": f"material/{icon}", "name": name}} | ({"scheme": scheme} if scheme else {})
            for (media, scheme), icon, name in zip(schemes, icons, self.language.palette, strict=True)
        ]  # fmt: skip
        top = "../" if self.language.folder else ""
        extra: dict[str, object] = {"top": top, "scripts": SCRIPTS.is_dir()}
        if SCRIPTS.is_dir():
            extra["polyfills"] = [f"{top}js/iframe-worker.js"]
        return {
            "INHERIT": "../mkdocs.yml",
            "docs_dir": self.language.code,
            "site_dir": f"../../site/{self.language.folder}",
            "site_description": self.language.description,
            "theme": {"custom_dir": "../theme", "language": self.language.code, "palette": palette},
            "nav": nav,
            "extra": extra,
        }

    def page(self, page: str) -> str:
        """Write a page; its address."""
        text = (ROOT / page).read_text(encoding="utf-8")
        pieces, start = [], 0
        for fence in _FENCE.finditer(text):
            pieces += [self.linked(text[start : fence.start()], page), fence[0]]
            start = fence.end()
        text = "".join([*pieces, self.linked(text[start:], page)])
        text = re.sub(r"^((?:Contents: |目录：)\[(?:.+\n)+)", r"\1{ .contents }\n", text, count=1, flags=re.M)
        if self.language is CHINESE and not page.endswith("_zh.md"):
            text = text.replace("\n\n", "\n\n*此页只有英文版。*\n\n", 1)  # after the title
        return self.save(address(page), text)

    def linked(self, text: str, page: str) -> str:
        """The text with the site's addresses in its links."""
        here, folder = address(page), os.path.dirname(page)

        def link(match: re.Match[str]) -> str:
            words, path, fragment = match[1], match[2], match[3] or ""
            target = os.path.normpath(os.path.join(folder, path)) if path else page
            if target.endswith(".md"):
                other = CHINESE if self.language is ENGLISH else ENGLISH
                if target != page and target == in_language(page, other):  # to the same page in the other language
                    top = "../" * (here.count("/") + bool(self.language.folder))
                    return f'<a href="{top}{other.folder}{here.removesuffix(".md")}.html">{words}</a>'
                twin = in_language(target, self.language)
                # both versions have the same headings in the same order
                if fragment and twin != target and fragment[1:] in anchors(target):
                    fragment = "#" + anchors(twin)[anchors(target).index(fragment[1:])]
                to = address(target)
            elif target.startswith("docs/images/"):
                to = target.removeprefix("docs/")
            elif (ROOT / target).exists() and not target.startswith(".."):
                to = self.source(target)
            else:
                return match[0]  # mkdocs reports it
            return f"[{words}]({os.path.relpath(to, os.path.dirname(here) or '.') if path else ''}{fragment})"

        return indented(_LINK.sub(link, text))

    def source(self, path: str) -> str:
        """Write a page that shows a file, or lists a folder; its address."""
        to = f"source/{path}.md"
        if path in self.shown:
            return to
        self.shown.add(path)
        text = f"---\nsearch:\n  exclude: true\n---\n# `{path}`\n\n"
        if (ROOT / path).is_dir():
            for child in sorted((ROOT / path).iterdir()):
                if child.name[0] not in "._":
                    self.source(f"{path}/{child.name}")
                    text += f"- [`{child.name}`]({os.path.basename(path)}/{child.name}.md)\n"
        else:
            text += f"````{lexer(path)}\n{(ROOT / path).read_text(encoding='utf-8')}\n````\n"
        return self.save(to, text)

    def save(self, to: str, text: str) -> str:
        file = self.folder / to
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return to


def indented(text: str) -> str:
    """Items of lists as Python-Markdown wants them: what belongs to one has four spaces, not two or three as on code hosts,
    and an item after such a paragraph has a blank line before it."""
    lines: list[str] = []
    added, paragraph, after_blank = 0, False, True
    for line in text.split("\n"):
        rest = line.lstrip(" ")
        indent = len(line) - len(rest)
        nested = re.match(r"- |\d+\. ", rest)
        if rest and indent < 2:
            if paragraph and nested and not after_blank:
                lines.append("")
            added, paragraph = 0, False
        elif rest and indent < 4 and (after_blank or nested):
            added, paragraph = 4 - indent, not nested
        lines.append(" " * added + line if rest else line)
        after_blank = not rest
    return "\n".join(lines)


def lexer(path: str) -> str:
    try:
        return get_lexer_for_filename(path).aliases[0]
    except ClassNotFound:
        return "text"


if __name__ == "__main__":
    shutil.rmtree(OUTPUT, ignore_errors=True)
    for language in (ENGLISH, CHINESE):
        Part(language).write()
    if SCRIPTS.is_dir():
        shutil.copytree(SCRIPTS, OUTPUT / "en" / "js")
