"""What a bench of configurations found, and its arithmetic. Times in seconds, sizes in bytes.

Absolute times drift with whatever else the machine does, so what counts is the ratio of figures of the same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

IDLE_LIMIT = 0.05
"""cores that a waiting process may keep busy before the figures of the others are in doubt"""


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, and the lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """
        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.0, high=3.0)
        """
        listed = list(values)
        return cls(statistics.median(listed), min(listed), max(listed))


def ratio(own: Sequence[float], reference: Sequence[float]) -> Spread:
    """``own / reference``, each of the same round.

    >>> ratio([2.0, 4.0, 1.0], [4.0, 4.0, 4.0])
    Spread(median=0.5, low=0.25, high=1.0)
    """
    return Spread.of(mine / other for mine, other in zip(own, reference, strict=True))


@dataclass
class Loaded:
    """What a process says of itself when it has loaded a configuration."""

    engine: str
    """what computes the experts, and its threads"""
    load: float
    """time to load, without the imports"""
    before: int
    """resident memory when all was imported and nothing loaded"""
    resident: int
    """resident memory after the load and one prompt: until then many weights are only mapped"""
    peak_loading: int
    """the most resident memory until then"""
    weights: int
    """bytes of all weights in the CPU's memory, packed as they are, with their LoRA"""
    experts_per_token: int
    """bytes of expert weights that one token reads from the CPU's memory"""
    others_per_token: int
    """bytes of all other weights that one token reads from there (all but the embedding)"""
    push: float | None = None
    """time to read one layer's expert LoRA and to hand it to the engine; None without any"""


@dataclass
class Measured:
    """One configuration, one entry a round."""

    name: str
    loaded: Loaded
    loads: list[float] = field(default_factory=list)
    """of each load, each in a process of its own"""
    prefill: dict[int, list[float]] = field(default_factory=dict)
    """prompt tokens -> time of the prompt, which is the time to the first token"""
    decode: dict[int, list[float]] = field(default_factory=dict)
    """prompt tokens -> median time of one more token"""
    idle: list[float] = field(default_factory=list)
    """cores that its process kept busy while it waited for its turn"""
    peak: int = 0
    """the most resident memory while answering"""
    gpu_memory: int = 0
    """the most that torch had allocated on GPUs"""

    @property
    def added(self) -> int:
        """Resident memory that the model added to the process."""
        return self.loaded.resident - self.loaded.before

    @property
    def over_weights(self) -> float | None:
        """Resident memory that the model added, over the bytes of the weights; None where all of them are on a GPU."""
        return self.added / self.loaded.weights if self.loaded.weights else None

    @property
    def restless(self) -> bool:
        """Whether it kept cores busy while others were measured."""
        return bool(self.idle) and statistics.median(self.idle) > IDLE_LIMIT


@dataclass(frozen=True)
class Machine:
    """What it was measured on."""

    cpu: str
    cores: int
    """physical cores that this process may use; as many threads read for the bandwidth"""
    bandwidth: list[float]
    """bytes read from memory in a second, one entry a round"""
    checkpoint: int
    """bytes of the model's checkpoint, 0 where it is not known"""


@dataclass(frozen=True)
class Report:
    """A whole run; the first row is the configuration itself."""

    machine: Machine
    rows: list[Measured]

    @property
    def references(self) -> list[Measured]:
        """The rows that others are compared with: the first, and stock transformers."""
        return [row for number, row in enumerate(self.rows) if number == 0 or row.name == "stock"]

    def ratios(self, row: Measured, reference: Measured) -> dict[str, Spread]:
        """Speeds: above 1, ``row`` is faster than ``reference``. Load time and memory: below 1, it needs less. A kind of memory
        that one of them needs none of is left out."""
        found: dict[str, Spread] = {}
        for kind, title in (("decode", "decode speed after {}"), ("prefill", "prefill speed, {} tokens")):
            own, other = getattr(row, kind), getattr(reference, kind)
            found |= {title.format(length): ratio(other[length], own[length]) for length in own}
        found["load time"] = ratio(row.loads, reference.loads)
        for title, own, other in (
            ("memory", row.added, reference.added),
            ("GPU memory", row.gpu_memory, reference.gpu_memory),
        ):
            if own > 0 and other > 0:
                found[title] = ratio([own], [other])
        return found

    def floor(self, row: Measured) -> Spread:
        """The time that reading one token's expert weights takes at the least."""
        return Spread.of(row.loaded.experts_per_token / speed for speed in self.machine.bandwidth)

    def bandwidth_share(self, row: Measured, length: int, *, others: bool) -> Spread:
        """Share of a token's time that reading its expert weights (with ``others``: all weights) would take."""
        read = row.loaded.experts_per_token + (row.loaded.others_per_token if others else 0)
        pairs = zip(row.decode[length], self.machine.bandwidth, strict=True)
        return Spread.of(read / speed / seconds for seconds, speed in pairs)

    def load_rate(self, row: Measured) -> float:
        """Bytes of the checkpoint loaded in a second by each core."""
        return self.machine.checkpoint / statistics.median(row.loads) / self.machine.cores

    def to_dict(self) -> dict[str, Any]:
        """All of it, and the ratios."""
        ratios = {
            reference.name: {
                row.name: {name: asdict(spread) for name, spread in self.ratios(row, reference).items()}
                for row in self.rows
                if row is not reference
            }
            for reference in self.references
        }
        derived = {
            row.name: {
                "memory_added": row.added,
                "memory_over_weights": row.over_weights,
                "load_rate_per_core": self.load_rate(row),
                "least_seconds_per_token": asdict(self.floor(row)),
            }
            for row in self.rows
        }
        rows = [{**asdict(row), **derived[row.name]} for row in self.rows]
        return {"machine": asdict(self.machine), "ratios": ratios, "rows": rows}
