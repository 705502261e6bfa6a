"""Where things are."""

from __future__ import annotations

import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
DATA = TESTS / "data"
DEMO = ROOT / "examples" / "demo"
CLI = Path(sysconfig.get_path("scripts")) / "llamafactory-cli"
CHROMIUM = Path("/usr/bin/chromium")
