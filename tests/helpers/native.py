"""The native kernels with AMX's tiles emulated."""

from __future__ import annotations

from helpers.places import TESTS

EMULATED_TILES = f'-DKT_EMULATED_TILES="{TESTS / "native" / "emulated_tiles.h"}"'
"""for the compiler"""
