"""Runs ``test_exactness.py`` and what else depends on versions in environments of others, and writes what came out into the docs.

``make test MATRIX=all`` runs the rows of ``rows.txt``, ``make test MATRIX="transformers==5.24.0 peft==0.21.2"`` one of your own. A row
replaces what this package and LLaMA-Factory ask for. ``results.json`` keeps the newest result of each row.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ROWS, RESULTS = HERE / "rows.txt", HERE / "results.json"
TESTS = (
    "matrix/test_exactness.py", "peft_side/test_given_names.py", "peft_side/test_untested_peft.py", "model/test_untested.py",
    "model/test_every_architecture.py", "model/test_formulas.py", "decoding/test_attention.py", "model/test_growing_cache.py", "tracing",

    "checkpoint/test_quantized.py", "checkpoint/test_fp8.py", "router_stats/test_router_stats.py", "adapters", "peft_side/test_split.py",
    "peft_side/test_starts.py", "peft_side/test_whole_weights.py", "faults/test_cross_product.py", "faults/test_adapter_folders.py",
    "tools/test_verify_dense.py", "decoding/test_quantized_cache.py", "decoding/test_latent_attention.py", "model/test_operator.py",
    "decoding/test_generate.py", "prompt_cache",
)  # fmt: skip
PAGES = {
    ROOT
    / "docs"
    / "versions.md": "| Python | transformers | PEFT | torch | LLaMA-Factory | kt-kernel | Tests | Farthest from float32 | bfloat16, of stock's error | Date |",
    ROOT
    / "docs"
    / "versions_zh.md": "| Python | transformers | PEFT | torch | LLaMA-Factory | kt-kernel | 测试 | 与 float32 的最大误差 | bfloat16 误差，与原版之比 | 日期 |",
}
"""page -> the head of its table"""
BEGIN, END = "<!-- results of make test MATRIX=all: written by tests/matrix/run.py -->", "<!-- end of results -->"
LIBRARIES = ("transformers", "peft", "torch", "llamafactory", "kt-kernel")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", nargs="+", help="the pins of one row, or: all")
    parser.add_argument("--uv", default="uv", help="uv's command")
    parser.add_argument(
        "--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="where a row names none"
    )
    parser.add_argument("--llamafactory", default="", help="checkout for llamafactory==main")
    parser.add_argument("--jobs", default="2", help="tests at a time")
    parser.add_argument("--keep", type=Path, help="make the environment here, and keep it")
    options = parser.parse_args()
    rows = [" ".join(options.row)]
    if rows == ["all"]:
        rows = [line for line in ROWS.read_text().splitlines() if line and not line.startswith("#")]
    wrong = [row for row in rows if not _run(row, options)]
    write_tables()
    print("\n".join(f"wrong: {row}" for row in wrong) or f"{len(rows)} rows are right")
    return len(wrong)


def _run(row: str, options: argparse.Namespace) -> bool:
    pins = dict(pin.split("==") for pin in row.split())
    if pins.get("llamafactory") == "main" and not options.llamafactory:
        print(f"left out, LLAMAFACTORY= names no checkout: {row}")
        return True
    with tempfile.TemporaryDirectory() as scratch:
        env = options.keep or Path(scratch) / "env"
        print(f"{row}\n  making {env} ...", flush=True)
        try:
            _make(env, pins, options, Path(scratch))
        except subprocess.CalledProcessError as error:  # the other rows can still be run
            print(f"  could not be made: {error}", flush=True)
            return False
        report = Path(scratch) / "report.xml"
        command = [
            env / "bin" / "python", "-m", "pytest", *(ROOT / "tests" / file for file in TESTS), "-q", "-n", options.jobs,
            f"--junitxml={report}", "-p", "no:cacheprovider",
        ]  # fmt: skip
        # the rows are outside of what LLaMA-Factory asks for: that is the point of them
        settings = {
            "DISABLE_VERSION_CHECK": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, check=False)
        found = _read(report) | {"versions": _versions(env), "date": datetime.now(UTC).date().isoformat()}
        if not options.keep:
            shutil.rmtree(env)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(dict(sorted({**results, row: found}.items())), indent=1) + "\n")
    return not found["wrong"] and found["right"] > 0


def _make(env: Path, pins: dict[str, str], options: argparse.Namespace, scratch: Path) -> None:
    """An environment with these versions, whatever the distributions ask for."""
    overrides = [f"{name}=={pins[name]}" for name in ("transformers", "peft", "torch") if name in pins]
    if "torch" in pins:  # an override replaces also what torchvision asks for
        minor = int(pins["torch"].split(".")[1])
        overrides += [f"torchvision==0.{min(minor + 15, 29)}.*", f"torchaudio=={pins['torch']}"]
    absent = [name for name, version in pins.items() if version == "none"]
    if "llamafactory" in absent:  # which is what imports torchaudio, and that has no release for the newest torch
        overrides = [line for line in overrides if "torchaudio" not in line]
        absent.append("torchaudio")
    overrides += [f"{name}; python_version < '3'" for name in absent]
    file = scratch / "overrides.txt"
    file.write_text("\n".join(overrides) + "\n")
    factory = [options.llamafactory] if pins.get("llamafactory") == "main" else []
    version = (
        [f"llamafactory=={pins['llamafactory']}"] if pins.get("llamafactory", "none") not in ("main", "none") else []
    )
    python = pins.get("python", options.python)
    subprocess.run([options.uv, "venv", "--quiet", "--python", python, env], check=True)
    install = [options.uv, "pip", "install", "--quiet", "--python", env / "bin" / "python", "--override", file]
    tests = ["pytest", "pytest-timeout", "pytest-xdist", "compressed-tensors", "hypothesis"]
    subprocess.run([*install, "--editable", ROOT, *factory, *version, *tests], check=True)


def _versions(env: Path) -> dict[str, str]:
    code = (
        "import json, platform, sys\nfrom importlib import metadata\nfound = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n    try: found[name] = metadata.version(name)\n"
        "    except metadata.PackageNotFoundError: found[name] = ''\nprint(json.dumps(found))"
    )
    result = subprocess.run(
        [env / "bin" / "python", "-c", code, *LIBRARIES], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(result.stdout)
    return found


def _read(report: Path) -> dict[str, Any]:
    """What pytest reports: tests that passed and skipped, names of the others, the largest of each error."""
    cases = ET.parse(report).iter("testcase")
    found: dict[str, Any] = {"right": 0, "skipped": 0, "wrong": [], "float32": 0.0, "bfloat16": 0.0}
    for case in cases:
        kinds = {child.tag for child in case}
        if "skipped" in kinds:
            found["skipped"] += 1
        elif kinds & {"failure", "error"}:
            found["wrong"].append(case.get("name"))
        else:
            found["right"] += 1
        for each in case.iter("property"):
            name = str(each.get("name"))
            found[name] = max(found[name], float(str(each.get("value"))))
    return found


def table(head: str) -> str:
    """The newest results, as a table in Markdown."""
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    results = json.loads(RESULTS.read_text()).values()
    for result in sorted(
        results, key=lambda each: [_order(each["versions"][name]) for name in ("transformers", "torch", "llamafactory")]
    ):
        versions = [result["versions"][name] or "—" for name in ("python", *LIBRARIES)]
        tests = f"{result['right']} of {result['right'] + len(result['wrong'])}"
        figures = [tests, f"{result['float32']:.1g}", f"{result['bfloat16']:.2f}", result["date"]]
        lines.append(f"| {' | '.join(versions + figures)} |")
    return "\n".join(lines)


def _order(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]


def write_tables() -> None:
    """Put the table between its marks in the docs, in both languages."""
    for page, head in PAGES.items():
        text = page.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        page.write_text(f"{before}{BEGIN}\n\n{table(head)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
