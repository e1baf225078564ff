"""Adapters on disk to the next one: module by module over all clients.

For a mean memory holds a module of some clients at a time; for the leading singular vectors of a sum, which are looked
for three times, a module of all, or of as many as there is room for, read anew for each look. Robust aggregators
compare clients and hold all.

Everything was validated before. Directories in, files in one directory out: the adapter's weights, its carry, and
the averages of the server's optimizer, each as an adapter's weights are stored. What looks at whole adapters (clipping,
Krum) goes over all modules once before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from hf_fedlarge.adapters import ADAPTER_WEIGHTS, AdapterReader, AdapterWriter
from hf_fedlarge.aggregate import (
    Aggregate,
    Change,
    Trained,
    averaged,
    exact,
    fedavg,
    product_terms,
    shares,
)
from hf_fedlarge.artifacts import CARRY_WEIGHTS, MOMENTUM_WEIGHTS, VARIANCE_WEIGHTS
from hf_fedlarge.blocks import in_order, workers
from hf_fedlarge.config import ADAPTIVE, AggregationSettings, LoraSettings
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.privacy import squared_change, with_noise
from hf_fedlarge.products import Term, are_many, merged, together, truncate
from hf_fedlarge.robust import COORDINATE, clip_factors, gram, krum, squared_norms
from hf_fedlarge.server_optimizer import OPTIMIZERS, Rates
from hf_fedlarge.tensors import Factors, StoredFactors
from hf_fedlarge.wire import EncodedReader

_AHEAD = 3  # modules that are computed or wait to be written
_AT_ONCE = 2**26  # bytes of a module's factors, of all updates together, up to which they are read once and kept
_room = threading.local()  # for them; made anew for every module, its pages would be, too


@dataclass(frozen=True)
class Part:
    """One accepted update: its factors, how much it counts, and what it started from if that was another adapter.

    `late` is the number of rounds that have passed since; such a change counts (1 + late)^-1/2 (FedBuff,
    arXiv 2106.06639) and the others no more for it, so that the step becomes smaller. `clients` is of how many clients
    it is the mean.
    """

    reader: AdapterReader | EncodedReader
    weight: float
    scale: float
    base: Path | None = None
    late: int = 0
    clients: int = 1


@dataclass(frozen=True)
class Combined:
    """What was written: for each part the share it had, and shares of the energy."""

    shares: list[float]
    modules: list[str]
    carry_rank: int
    carried: float
    dropped: float


@dataclass
class _Client:
    """An update being read; `factor` is what lateness and clipping leave of its change, `base` None the parent's."""

    reader: AdapterReader | EncodedReader
    base: AdapterReader | None
    scale: float
    weight: float
    factor: float


class _Then(NamedTuple):
    """One module as it was before the round."""

    factors: Factors | None
    carry: Factors | None
    momentum: Factors | None
    variance: Factors | None


class _Before:
    """The adapter that clients started from, with the files beside it."""

    def __init__(self, parent: Path | None) -> None:
        names = (ADAPTER_WEIGHTS, CARRY_WEIGHTS, MOMENTUM_WEIGHTS, VARIANCE_WEIGHTS)
        self._readers = [AdapterReader(parent, name) for name in names] if parent else []
        self.modules = self._readers[0].modules if parent else []

    def read(self, module: str) -> _Then:
        found = [reader.read(module) if module in reader else None for reader in self._readers]
        return _Then(*found) if found else _Then(None, None, None, None)


Next = tuple[Aggregate, Factors | None, Factors | None]
"""A module's aggregate, and the averages of changes and of their squares."""


def combine(
    parts: Sequence[Part],
    parent: Path | None,
    output: Path,
    lora: LoraSettings,
    settings: AggregationSettings,
    trained: Trained = "both",
    cohort: int | None = None,
) -> Combined:
    """Aggregate updates with the adapter before them, and write the weights of the next one into `output`.

    A module is aggregated over the clients that have it, whose weights are normalised among them; one that no client
    has stays as it was.

    Args:
        parts: the updates, in an order that doesn't depend on their arrival.
        parent: the adapter that clients started from (its carry and the optimizer's averages beside it); None: none.
        output: a directory that exists.
        lora: rank and scale of the result, and the parent's own.
        settings: how.
        trained: which factors clients were to train.
        cohort: how many clients were asked, which is what `privacy` divides by; it needs one, and a parent.

    Raises:
        ConfigError: the settings need a parent or more updates, or the aggregator can't take these updates.
    """
    if parent is None and (settings.server_optimizer != "none" or settings.aggregator in ("ffa", "alternate")):
        what = settings.aggregator if settings.server_optimizer == "none" else settings.server_optimizer
        raise ConfigError(f"{what} needs the adapter that clients started from; start one first and give --adapter.")
    before = _Before(parent)
    bases = {part.base: AdapterReader(part.base) for part in parts if part.base is not None}
    weights = [part.clients / cohort for part in parts] if settings.privacy else shares([part.weight for part in parts])
    clients = [
        _Client(part.reader, bases.get(part.base), part.scale, weight, (1 + part.late) ** -0.5)
        for part, weight in zip(parts, weights, strict=True)
    ]
    modules = sorted({module for client in clients for module in client.reader.modules} | set(before.modules))
    _look_at_whole_updates([client for client in clients if client.weight], before, modules, settings)

    energy = dropped = carried = 0.0
    carry_rank = 0

    def aggregated(module: str) -> Next:
        then = before.read(module)
        changes = _changes(clients, then, module, 1.0 if settings.privacy else None)
        if settings.privacy:  # as one client's change more
            deviation = settings.privacy.noise_multiplier * settings.privacy.clip / cohort
            changes.append(Change(1.0, lora.scale, with_noise(then.factors, trained, deviation), then.factors))
        if not changes:
            return Aggregate(then.factors, 0.0, 0.0, then.carry), then.momentum, then.variance
        return AGGREGATORS[settings.aggregator](changes, then, lora, settings, trained)

    # A thread a module: what is computed for one is small, and threads that share it would wait for each other.
    with ExitStack() as stack:
        pool = stack.enter_context(workers())
        writers = [
            stack.enter_context(AdapterWriter(output, name))
            for name in (ADAPTER_WEIGHTS, CARRY_WEIGHTS, MOMENTUM_WEIGHTS, VARIANCE_WEIGHTS)
        ]
        for module, (result, momentum, variance) in zip(
            modules, in_order(pool, aggregated, modules, ahead=_AHEAD), strict=True
        ):
            for writer, factors in zip(writers, (result.factors, result.carry, momentum, variance), strict=True):
                if factors is not None:
                    writer.write(module, factors)
            carry_rank = max(carry_rank, len(result.carry.A_RI) if result.carry else 0)
            energy, dropped, carried = energy + result.energy, dropped + result.dropped, carried + result.carried
    return Combined(
        [client.weight * client.factor for client in clients],
        modules,
        carry_rank,
        carried / energy if energy else 0.0,
        dropped / energy if energy else 0.0,
    )


def _look_at_whole_updates(
    clients: list[_Client], before: _Before, modules: list[str], settings: AggregationSettings
) -> None:
    """What depends on all modules of an update: who is kept, and how much of its change counts."""
    choosing = settings.aggregator in ("krum", "multi_krum")
    if choosing and len({tuple(client.reader.modules) for client in clients}) > 1:
        raise ConfigError(f"{settings.aggregator} compares whole updates, but clients have trained different modules.")
    products, squares = 0.0, torch.zeros(len(clients), dtype=torch.float64)
    bound = settings.privacy.clip if settings.privacy else settings.clip
    for module in modules if choosing or bound is not None else []:
        then = before.read(module)
        having = [number for number, client in enumerate(clients) if module in client.reader]
        changes = _changes(clients, then, module)
        if choosing:
            products = products + gram(changes)
        if settings.clip is not None and changes:
            squares[having] += squared_norms(changes)
        if settings.privacy and changes:
            squares[having] += torch.stack([squared_change(change.factors, change.base) for change in changes])
    if bound is not None:
        for client, factor in zip(clients, clip_factors(squares, bound), strict=True):
            client.factor *= factor
    if choosing:
        keep = 1 if settings.aggregator == "krum" else max(1, len(clients) - settings.byzantine - 2)
        kept = krum(products, settings.byzantine, keep)
        for number, client in enumerate(clients):
            client.weight = 1 / len(kept) if number in kept else 0.0


def _changes(clients: Sequence[_Client], then: _Then, module: str, total: float | None = None) -> list[Change]:
    """The changes to a module of those clients that have it, their weights normalised among them, or by `total`."""
    having = [client for client in clients if client.weight and module in client.reader]
    total = total or sum(client.weight for client in having)
    bases: dict[int, Factors | None] = {id(None): then.factors}  # each read once, so that equal ones are the same
    changes = []
    for client in having:
        if id(client.base) not in bases:
            bases[id(client.base)] = client.base.read(module) if module in client.base else None
        share = client.weight / total * client.factor
        changes.append(Change(share, client.scale, client.reader.stored(module), bases[id(client.base)]))
    return changes


def _on_products(
    changes: list[Change], then: _Then, lora: LoraSettings, settings: AggregationSettings, _: Trained
) -> Next:
    """`exact`, with the carry of the round before and momentum."""
    carry_rank = settings.carried_rank(lora.rank)
    more = [Term(lora.scale, then.carry)] if then.carry else []
    moved = _looked_at_often(merged(product_terms(changes, None, lora.scale)), lora.rank + carry_rank)
    momentum = None
    if settings.server_optimizer == "momentum":
        past = [Term(settings.server_beta1 * lora.scale, then.momentum)] if then.momentum else []
        more += [Term(settings.server_step * coefficient, factors) for coefficient, factors in past]
        now = merged([*moved, *past])
        momentum = truncate(now, lora.rank + carry_rank, lora.scale).factors if now else then.momentum
    result = exact(
        [],
        lora.rank,
        lora.scale,
        parent=then.factors,
        more=[*(Term(settings.server_step * coefficient, factors) for coefficient, factors in moved), *more],
        carry_rank=carry_rank,
        carry_energy=settings.carry_energy,
    )
    return result, momentum, None


def _looked_at_often(terms: list[Term], count: int) -> list[Term]:
    """The same sum, read once if there is room; very many terms as one, or a few."""
    if are_many(terms, count):
        if not hasattr(_room, "values"):
            _room.values = torch.empty(_AT_ONCE // 4)
        return together(terms, _room.values)
    if sum(factors.nbytes for _, factors in terms if isinstance(factors, StoredFactors)) > _AT_ONCE:
        return terms
    # In memory already is what several clients started from; the same object there is counted once.
    return [
        Term(coefficient, factors if isinstance(factors, Factors) else Factors(*factors))
        for coefficient, factors in terms
    ]


def _by_coordinate(
    changes: list[Change], then: _Then, lora: LoraSettings, settings: AggregationSettings, trained: Trained
) -> Next:
    """A robust mean of the changes in place of their mean."""
    count = lora.rank + settings.carried_rank(lora.rank)
    # Shares are equal but for what clipping and lateness left of a change; that is a part of it here.
    changes = [change._replace(scale=change.scale * change.share * len(changes)) for change in changes]
    hostile = {"byzantine": settings.byzantine} if settings.byzantine else {}
    one, lost = COORDINATE[settings.aggregator](changes, count, **hostile)
    result, *averages = _on_products([one], then, lora, settings, trained)
    return result._replace(dropped=result.dropped + lost * settings.server_step**2), *averages


def _on_factors(
    changes: list[Change], then: _Then, lora: LoraSettings, settings: AggregationSettings, trained: Trained
) -> Next:
    """`fedavg`, and a step of the server's optimizer along the mean change of those factors that were trained."""
    if settings.server_optimizer == "none":
        stepped = [change._replace(share=change.share * settings.server_step) for change in changes]
        result = fedavg(stepped, lora.rank, lora.scale, parent=then.factors, trained=trained)
        return result, None, None
    result = fedavg(changes, lora.rank, lora.scale, parent=then.factors, trained=trained)
    rates = Rates(settings.server_step, settings.server_beta1, settings.server_beta2, settings.server_eps)
    after = []
    for letter, old, change, m, v in zip(
        "AB", then.factors, averaged(changes), then.momentum or (None, None), then.variance or (None, None), strict=True
    ):
        state = tuple(torch.zeros_like(old) if part is None else part for part in (m, v))
        if trained in ("both", letter):
            step, state = OPTIMIZERS[settings.server_optimizer](change, tuple(part.double() for part in state), rates)
            after.append((old.double() + step, *state))
        else:
            after.append((old, *state))
    factors, momentum, variance = (Factors(*pair) for pair in zip(*after, strict=True))
    factors = Factors(*(factor.float() for factor in factors))
    return result._replace(factors=factors), momentum, variance if settings.server_optimizer in ADAPTIVE else None


AGGREGATORS: dict[str, Callable[[list[Change], _Then, LoraSettings, AggregationSettings, Trained], Next]] = {
    "exact": _on_products,
    "svd": _on_products,
    "fedavg": _on_factors,
    "ffa": _on_factors,
    "alternate": _on_factors,
    "median": _by_coordinate,
    "trimmed_mean": _by_coordinate,
    "krum": _on_products,
    "multi_krum": _on_products,
}
