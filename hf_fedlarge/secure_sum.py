"""Updates and adapters as the vectors of secure aggregation (`secagg.py`, `fixed_point.py`), and back.

A client's vector is the change of the factors that its round trains, module by module in the order of their names. What
the server gets of all of them is the mean change, which becomes the next adapter as one client's would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hf_fedlarge.adapters import AdapterReader, expected_shapes, write_config
from hf_fedlarge.aggregate import Trained
from hf_fedlarge.architectures import describe
from hf_fedlarge.artifacts import (
    AdapterManifest,
    PackageManifest,
    UpdateManifest,
    check_output,
    describe_files,
    read_manifest,
    staged_directory,
    write_manifest,
)
from hf_fedlarge.combine import Part, combine
from hf_fedlarge.config import AggregationSettings, FederationConfig
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.fixed_point import MORE_WORDS, Mean, count_told, mean_of, quantized, weight_level
from hf_fedlarge.keys import PrivateKey, sign_update
from hf_fedlarge.ledger import Draw
from hf_fedlarge.lineage import check_continues, read_previous, seal
from hf_fedlarge.orders import SecureOrder
from hf_fedlarge.package import package_config
from hf_fedlarge.privacy import squared_change
from hf_fedlarge.robust import clip_factors
from hf_fedlarge.server import RoundServer
from hf_fedlarge.tensors import Factors, StoredFactors
from hf_fedlarge.update import MASKED_WORDS, Expected

SUM = ".secure/sum"  # in a round's work
_TOLD = ("seconds", "peak_memory_bytes")  # of what a client measures
# Of the numbers that a client changed: what has to arrive as more than a sign, so that it hides others in the sum.
_TOLD_AT_LEAST = 0.75
_TRAINED: dict[Trained, tuple[int, ...]] = {"both": (0, 1), "A": (0,), "B": (1,)}  # of a module's factors


def count_words(expected: Expected, trains: Trained) -> int:
    """How many words a masked update has."""
    shapes = expected_shapes(expected.architecture, expected.package.kept_layers, expected.lora)
    return MORE_WORDS + _count(shapes.values(), trains)


def _count(shapes: Iterable[tuple[Sequence[int], Sequence[int]]], trains: Trained) -> int:
    """How many numbers are trained of factors with these shapes."""
    return sum(math.prod(pair[index]) for pair in shapes for index in _TRAINED[trains])


def mask_update(
    update: Path,
    adapter: Path,
    output: Path,
    order: SecureOrder,
    clients: int,
    roster: str,
    add_masks: Callable[[np.ndarray], None],
    key: PrivateKey | None = None,
) -> UpdateManifest:
    """Make of a client's own update the one that it sends.

    Args:
        update: what it trained.
        adapter: what it started from.
        output: the directory to make.
        order: how.
        clients: how many take part.
        roster: digest of who.
        add_masks: masks words in place.
        key: signs it; None: it is not signed.

    Raises:
        ArtifactError: the update is of another adapter, or the order would leave too little of its change.
    """
    manifest, parent = read_manifest(update, UpdateManifest), read_manifest(adapter, AdapterManifest)
    if manifest.adapter != parent.digest:
        raise ArtifactError(f"{update} did not start from {adapter}; expected the adapter that it was trained from.")
    before, after = AdapterReader(adapter), AdapterReader(update)
    modules, factor = sorted(after.modules), 1.0
    if parent.privacy:  # again, for in fp32 a clipped change may be a little too long
        square = sum(squared_change(after.read(module), before.read(module)) for module in modules)
        [factor] = clip_factors(square[None], parent.privacy.clip)

    count = _count((before.stored(module).shapes for module in modules), parent.trains)
    weight = 1 if order.weighting == "equal" else getattr(manifest, order.weighting)
    most = 1 if order.weighting == "equal" else order.most
    level = weight_level(weight, most, clients)
    changed = told = 0

    def changes() -> Iterator[np.ndarray]:
        nonlocal changed, told
        for module in modules:
            old, new = before.read(module), after.read(module)
            for index in _TRAINED[parent.trains]:
                values = factor * (new[index].double() - old[index].double()).flatten().numpy()
                changed += int(np.count_nonzero(values))
                told += count_told(values, order.limit, level)
                yield values

    words = quantized(changes(), count, order.limit, level)
    if told < _TOLD_AT_LEAST * changed:
        raise ArtifactError(
            f"the order's limit {order.limit:g} would cut to 0 or clip more than a quarter of the numbers that "
            f"{manifest.client} changed, and so show what others changed; expected one that leaves three quarters of "
            "them: have the server choose another secure.limit, or weighting: equal."
        )
    add_masks(words)
    # How many steps were taken would tell how many examples there are.
    measured = {name: value for name, value in manifest.measured.items() if name in _TOLD}
    said = {"examples": 0, "tokens": 0, "loss_before": None, "loss_after": None, "roster": roster, "measured": measured}
    with staged_directory(output, overwrite=True) as staging:
        words.astype("<u4", copy=False).tofile(staging / MASKED_WORDS)
        manifest = manifest.model_copy(update=said | {"files": describe_files(staging)})
        write_manifest(staging, manifest)
        if key:
            sign_update(staging, manifest, key)
    return manifest


def read_words(path: Path) -> np.ndarray:
    """The words of a file that was checked."""
    return np.fromfile(path, dtype="<u4").astype(np.uint32, copy=False)


class MeanReader:
    """An adapter moved by the mean change, as `AdapterReader` gives one; what was trained is in fp64.

    Attributes:
        modules: paths in global numbers, in the order of the words.
    """

    def __init__(self, adapter: Path, mean: Mean, trains: Trained) -> None:
        self._before, self._mean = AdapterReader(adapter), mean
        self._trained = _TRAINED[trains]
        self.modules = sorted(self._before.modules)
        self._start, start = {}, 0
        for module in self.modules:
            self._start[module] = start
            start += _count([self._before.stored(module).shapes], trains)
        assert start == len(mean.steps), f"{len(mean.steps)} numbers for {start}"

    def __contains__(self, module: str) -> bool:
        return module in self._start

    def read(self, module: str) -> Factors:
        """The module's factors."""
        start, factors = self._start[module], []
        for index, factor in enumerate(self._before.read(module)):
            if index in self._trained:
                change = self._mean.values(start, start + factor.numel())
                start += factor.numel()
                factor = factor.double() + torch.from_numpy(change).reshape(factor.shape)
            factors.append(factor)
        return Factors(*factors)

    def stored(self, module: str) -> StoredFactors:
        """Likewise, to be read when they are needed."""
        return StoredFactors(partial(self.read, module), self._before.stored(module).shapes)


def aggregate_sum(server: RoundServer, package: Path, output: Path, previous: Path, config: FederationConfig) -> None:
    """Make a round's next adapter of the sum that its last stage left in `SUM`.

    Raises:
        FedLargeError: as `aggregate_mean`.
    """
    found, equal = server.stage(server.last_order, "reveal"), config.weighting == "equal"
    words = read_words(server.work / SUM / MASKED_WORDS)
    mean = mean_of(words, config.secure.limit, found["of"], found["clients"], equal=equal)
    aggregate_mean(mean, found["clients"], package, output, previous, config, server.number, server.draw)


def aggregate_mean(
    mean: Mean,
    clients: int,
    package: Path,
    output: Path,
    previous: Path,
    settings: AggregationSettings,
    round_number: int,
    draw: Draw | None = None,
) -> AdapterManifest:
    """Make the next adapter of clients' mean change, as `collect.aggregate_updates` does of their updates.

    Its manifest names no contributions, and what averaging of two factors loses nobody knows: `energy_dropped` is 0.

    Args:
        mean: the change.
        clients: of how many.
        package: what they trained on.
        output: the adapter directory to make.
        previous: the adapter they started from.
        settings: how; the aggregator is `ffa` or `fedavg`.
        round_number: the round.
        draw: how many clients were asked, of how many, for `privacy`.

    Raises:
        ConfigError: settings that the previous adapter doesn't go with.
        ArtifactError: the package or the adapter is not what it should be.
        OutputError: `output` exists or can't be written.
    """
    check_output(output, False)
    small = read_manifest(package, PackageManifest)
    parent = read_previous(previous, small)
    check_continues(previous, parent, settings, round_number)
    part = Part(MeanReader(previous, mean, parent.trains), 1.0, parent.lora.scale, clients=clients)
    with staged_directory(output) as staging:
        cohort = draw.cohort if draw else None
        combined = combine([part], previous, staging, parent.lora, settings, parent.trains, cohort)
        write_config(staging, combined.modules, parent.lora, describe(package_config(package)), small.base)
        return seal(staging, small, parent, parent.lora, round_number, settings, draw)
