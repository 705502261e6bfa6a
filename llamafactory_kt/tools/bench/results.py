"""The results of a bench of configurations, and their arithmetic. Times in seconds, sizes in bytes.

Absolute times drift with whatever else the machine does. Only ratios of measurements of the same round count.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from .speed import Speed

PARTS = ATTENTION, LINEAR, EXPERTS, OUTPUT = "attention", "linear", "experts", "output"
"""scores, softmax and sums over values; the layers' products, shared experts' included; the routed experts; the output layer"""
BETWEEN = "between"
"""what a forward does beside its parts: norms, rotary positions, routers, sums, the cache, the choice of a token"""
IDLE_LIMIT = 0.05
"""cores that a waiting process may keep busy before the other results are in doubt"""


@dataclass(frozen=True)
class Spread:
    """The median over rounds, and the lowest and highest."""

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

    def show(self, factor: float = 1, digits: int = 1) -> str:
        """
        >>> Spread(2.0, 1.0, 3.0).show(10, 0), Spread(2.0, 2.0, 2.0).show()
        ('20 (10-30)', '2.0')
        """
        middle, low, high = (f"{factor * value:.{digits}f}" for value in (self.median, self.low, self.high))
        return middle if low == high else f"{middle} ({low}-{high})"


def ratio(own: Sequence[float], reference: Sequence[float]) -> Spread:
    """``own / reference``, each of the same round.

    >>> ratio([2.0, 4.0, 1.0], [4.0, 4.0, 4.0])
    Spread(median=0.5, low=0.25, high=1.0)
    """
    return Spread.of(mine / other for mine, other in zip(own, reference, strict=True))


@dataclass(frozen=True)
class Speeds:
    """Around one measurement."""

    before: Speed
    """the prompt"""
    between: Speed
    """the prompt and the tokens after it"""
    after: Speed
    """the tokens"""

    @property
    def prompt_products(self) -> float:
        """Operations per second while the prompt was computed."""
        return (self.before.products + self.between.products) / 2

    @property
    def token_reads(self) -> float:
        """Bytes per second while tokens were computed."""
        return (self.between.reads + self.after.reads) / 2


QUESTION = 32
"""new tokens of a second turn"""


class SecondTurn(NamedTuple):
    """The next question of a conversation, whose keys and values are kept."""

    first_token: float
    """time from the call of ``generate`` with the whole conversation"""
    forward: float
    """time of the model with the new tokens alone, on the same keys and values"""


@dataclass(frozen=True)
class ForwardParts:
    """Where the time of a forward goes; medians, if there are several."""

    total: float
    """with the timing of the parts"""
    parts: dict[str, float]
    """part -> seconds, :data:`BETWEEN` included"""

    @classmethod
    def of(cls, forwards: Iterable[tuple[float, dict[str, float]]]) -> ForwardParts:
        """
        Args:
            forwards: (seconds, seconds of each part).

        >>> ForwardParts.of([(5.0, {"experts": 3.0})])
        ForwardParts(total=5.0, parts={'experts': 3.0, 'between': 2.0})
        """
        listed = [(total, {**parts, BETWEEN: total - sum(parts.values())}) for total, parts in forwards]
        names = listed[0][1]
        medians = {name: statistics.median(parts[name] for _, parts in listed) for name in names}
        return cls(statistics.median(total for total, _ in listed), medians)


@dataclass(frozen=True)
class PartsResult:
    """A pass of its own, in which the prompt and every other token are timed part by part."""

    prompt: ForwardParts
    token: ForwardParts
    plain_token: float
    """median time of the tokens between them, which are not timed by part"""
    speeds: Speeds | None = None


@dataclass
class LoadStats:
    """What a worker process reports after it has loaded its configuration."""

    engine: str
    """what computes the experts, and its threads"""
    load: float
    """load time, without the imports"""
    before: int
    """resident memory after the imports"""
    resident: int
    """resident memory after the load and one prompt; before a prompt, many weights are only mapped"""
    peak_loading: int
    """peak resident memory until then"""
    weights: int
    """all weights in CPU memory as packed, with their LoRA"""
    experts_per_token: int
    """expert weights that one token reads from CPU memory"""
    others_per_token: int
    """other weights that one token reads from CPU memory: all but the embedding"""
    lora_per_token: int = 0
    """LoRA that one token reads from CPU memory; in none of the two above"""
    push: float | None = None
    """time to read one layer's expert LoRA and hand it to the engine; None without expert LoRA"""
    layers: int = 1
    """the model's layers, dense ones included"""
    cache: dict[int, int] = field(default_factory=dict)
    """prompt tokens -> bytes of keys and values after them, in CPU memory"""
    operations: dict[int, dict[str, float]] = field(default_factory=dict)
    """prompt tokens -> part -> floating-point operations on the CPU, without LoRA's"""


@dataclass
class ConfigResult:
    """The measurements of one configuration, one entry per round."""

    name: str
    loaded: LoadStats
    loads: list[float] = field(default_factory=list)
    """time of each load, each in its own process"""
    prefill: dict[int, list[float]] = field(default_factory=dict)
    """prompt tokens -> time to the first token"""
    decode: dict[int, list[float]] = field(default_factory=dict)
    """prompt tokens -> median time of each further token"""
    speeds: dict[int, list[Speeds]] = field(default_factory=dict)
    """prompt tokens -> the machine's speed around each"""
    parts: dict[int, PartsResult] = field(default_factory=dict)
    """prompt tokens -> where the time goes; empty if that was not measured"""
    idle: list[float] = field(default_factory=list)
    """cores that the process kept busy while it waited for its turn"""
    peak: int = 0
    """peak resident memory while generating"""
    gpu_memory: int = 0
    """peak memory that torch allocated on GPUs"""
    resident: int = 0
    """resident memory at the end, all configurations loaded"""
    proportional: int | None = None
    """the same, but pages that several processes share are divided among them; None where the system does not tell"""
    turns: dict[int, list[SecondTurn]] = field(default_factory=dict)
    """prompt tokens -> the next question after prompt and answer; empty where nothing of them is kept"""

    @property
    def added(self) -> int:
        """Resident memory that the model added to the process."""
        return self.loaded.resident - self.loaded.before

    @property
    def over_weights(self) -> float | None:
        """Resident memory that the model added, over the bytes of the weights; None if all of them are on a GPU."""
        return self.added / self.loaded.weights if self.loaded.weights else None

    @property
    def restless(self) -> bool:
        """Whether it kept cores busy while others were measured."""
        return bool(self.idle) and statistics.median(self.idle) > IDLE_LIMIT


@dataclass(frozen=True)
class BenchMachine:
    """The machine of a bench."""

    cpu: str
    cores: int
    """physical cores that this process may use; the bandwidth is measured with as many threads"""
    bandwidth: list[float]
    """memory bandwidth in bytes per second, one entry per measurement of it"""
    checkpoint: int
    """bytes of the model's checkpoint, 0 if unknown"""
    products: list[float] = field(default_factory=list)
    """rate of a large matrix product in operations per second, one entry per measurement of it"""


@dataclass(frozen=True)
class BenchReport:
    """A whole bench; the first row is the configuration itself."""

    machine: BenchMachine
    rows: list[ConfigResult]

    @property
    def references(self) -> list[ConfigResult]:
        """The rows that others are compared with: the first, and stock transformers."""
        return [row for number, row in enumerate(self.rows) if number == 0 or row.name == "stock"]

    def ratios(self, row: ConfigResult, reference: ConfigResult) -> dict[str, Spread]:
        """Speeds: above 1, ``row`` is faster than ``reference``. Load time and memory: below 1, it needs less.

        A kind of memory is left out if one of the two needs none of it.
        """
        found: dict[str, Spread] = {}
        for kind, title in (("decode", "decode speed after {}"), ("prefill", "prefill speed, {} tokens")):
            own, other = getattr(row, kind), getattr(reference, kind)
            found |= {title.format(length): ratio(other[length], own[length]) for length in own}
        found["load time"] = ratio(row.loads, reference.loads)
        if row.added > 0 and reference.added > 0:
            found["memory"] = ratio([row.added], [reference.added])
        if row.gpu_memory > 0 and reference.gpu_memory > 0:
            found["GPU memory"] = ratio([row.gpu_memory], [reference.gpu_memory])
        return found

    def floor(self, row: ConfigResult) -> Spread:
        """The least time to read one token's expert weights."""
        return Spread.of(row.loaded.experts_per_token / speed for speed in self.machine.bandwidth)

    def token_bytes(self, row: ConfigResult, length: int) -> int:
        """Bytes that a token after a prompt reads from CPU memory at least: weights but for LoRA, keys and values."""
        return row.loaded.experts_per_token + row.loaded.others_per_token + row.loaded.cache.get(length, 0)

    def bandwidth_share(self, row: ConfigResult, length: int) -> Spread:
        """Share of the memory bandwidth around it that a token reaches."""
        read, pairs = self.token_bytes(row, length), zip(row.decode[length], row.speeds[length], strict=True)
        return Spread.of(read / speeds.token_reads / seconds for seconds, speeds in pairs)

    def peak_share(self, row: ConfigResult, length: int) -> Spread:
        """Share of the rate of a large product around it that a prompt reaches, on the CPU."""
        operations = sum(row.loaded.operations.get(length, {}).values())
        pairs = zip(row.prefill[length], row.speeds[length], strict=True)
        return Spread.of(operations / speeds.prompt_products / seconds for seconds, speeds in pairs)

    def timing_costs(self, row: ConfigResult, length: int) -> tuple[float, float]:
        """(prompt, token): time with the timing of parts over time without; a prompt is compared with the median of the rounds, where
        the machine may have been faster or slower."""
        found = row.parts[length]
        return found.prompt.total / statistics.median(row.prefill[length]), found.token.total / found.plain_token

    def load_rate(self, row: ConfigResult) -> float:
        """Bytes of the checkpoint that each core loads per second."""
        return self.machine.checkpoint / statistics.median(row.loads) / self.machine.cores

    def to_dict(self) -> dict[str, Any]:
        """All measurements and ratios, for JSON."""
        ratios = {
            reference.name: {
                row.name: {name: asdict(spread) for name, spread in self.ratios(row, reference).items()}
                for row in self.rows
                if row is not reference
            }
            for reference in self.references
        }
        rows = [
            {
                **asdict(row), "memory_added": row.added, "memory_over_weights": row.over_weights,
                "load_rate_per_core": self.load_rate(row), "least_seconds_per_token": asdict(self.floor(row)),
                "bytes_per_token": {length: self.token_bytes(row, length) for length in row.decode},
                "bandwidth_share": {length: asdict(self.bandwidth_share(row, length)) for length in row.decode},
                "peak_share": {length: asdict(self.peak_share(row, length)) for length in row.prefill},
                "timing_costs": {length: self.timing_costs(row, length) for length in row.parts},
            }
            for row in self.rows
        ]  # fmt: skip
        return {"machine": asdict(self.machine), "ratios": ratios, "rows": rows}
