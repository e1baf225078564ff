"""Collect a round's updates into the next adapter: validate each, refuse the bad by name, aggregate the rest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_fedlarge.adapters import AdapterReader, initial_factors, target_linears, write_adapter
from hf_fedlarge.aggregate import AGGREGATORS
from hf_fedlarge.architectures import Architecture, describe
from hf_fedlarge.artifacts import (
    AdapterManifest,
    Contribution,
    PackageManifest,
    UpdateManifest,
    check_output,
    describe_files,
    read_manifest,
    staged_directory,
    verify_files,
    write_manifest,
)
from hf_fedlarge.config import Codec, LoraSettings
from hf_fedlarge.errors import ArtifactError, ConfigError, UpdateRefusedError
from hf_fedlarge.package import package_architecture, package_config
from hf_fedlarge.tensors import Factors
from hf_fedlarge.update import Asked, Expected, client_name, open_update, read_update, validate_update
from hf_fedlarge.wire import Wire

WEIGHTINGS = ("tokens", "examples")


@dataclass(frozen=True)
class Collected:
    """The adapter's manifest, and who was refused with the reason."""

    manifest: AdapterManifest
    refused: tuple[tuple[str, str], ...]


def start_adapter(
    package: Path, output: Path, lora: LoraSettings, seed: int, *, overwrite: bool = False
) -> AdapterManifest:
    """Write the adapter that a federation starts from, round 0: it changes nothing yet, and is the same for all.

    Raises:
        ArtifactError: `package` is not a package.
        ConfigError: `lora` names a target that the model lacks.
        OutputError: `output` exists or can't be written.
    """
    small = read_manifest(package, PackageManifest)
    architecture = describe(package_config(package))
    factors = initial_factors(architecture, small.kept_layers, lora, seed)
    manifest = AdapterManifest(
        files={},
        base=small.base,
        package=small.digest,
        parent=None,
        round=0,
        layers=small.kept_layers,
        lora=lora,
        aggregator=None,
    )
    return _write(output, factors, manifest, architecture, overwrite)


def aggregate_updates(
    updates: list[Path],
    package: Path,
    output: Path,
    *,
    aggregator: str = "exact",
    previous: Path | None = None,
    weighting: str = "tokens",
    round_number: int | None = None,
    min_updates: int = 1,
    asked: Mapping[Path, Asked] | None = None,
    codec: Codec | None = None,
    overwrite: bool = False,
) -> Collected:
    """Validate updates and aggregate those that pass into an adapter in global layer numbers.

    The previous adapter says which LoRA settings and which round the updates must have. Without one it is what most
    of the updates' manifests agree on, so that one bad client can't decide it; see `_majority`.

    Args:
        updates: update directories; a client may send one.
        package: the package they were trained on.
        output: the adapter directory to make.
        aggregator: a name in `aggregate.AGGREGATORS`.
        previous: the adapter the clients started from; None: they started by themselves.
        weighting: `tokens` or `examples`; how much a client counts.
        round_number: the round they must be for; None: the one after `previous`, or that of the majority.
        min_updates: fewer valid updates than this make no adapter.
        asked: for each of `updates`, whose it must be and the most that client can have trained on; None: not known.
        codec: how the updates must be encoded; None: fp32. Any other needs `previous`, which their changes are from.
        overwrite: replace an adapter that is there already.

    Raises:
        UpdateRefusedError: too few were valid; each refusal is in the message, and nothing is written.
        ConfigError: an unknown aggregator or weighting, no update given, or a codec without `previous`.
        ArtifactError: the package or the previous adapter is not what it should be.
        OutputError: `output` exists or can't be written.
    """
    if aggregator not in AGGREGATORS:
        raise ConfigError(f"The aggregator {aggregator!r} is not known; choose among {', '.join(AGGREGATORS)}.")
    if weighting not in WEIGHTINGS:
        raise ConfigError(f"The weighting {weighting!r} is not known; choose among {', '.join(WEIGHTINGS)}.")
    if not updates:
        raise ConfigError("No update was given; expected at least one update directory.")
    codec = codec or Codec()
    if codec.name != "fp32" and previous is None:
        raise ConfigError(f"The codec {codec.name} needs --adapter, the adapter that the updates started from.")
    check_output(output, overwrite)
    small = read_manifest(package, PackageManifest)
    architecture = describe(package_config(package))
    parent = _read_previous(previous, small) if previous else None
    if parent:
        lora, number = parent.lora, parent.round + 1 if round_number is None else round_number
    else:
        lora, number = _majority(updates, small, architecture, round_number)

    wire = None
    if codec.name != "fp32":
        wire = Wire(codec, AdapterReader(previous), package_architecture(package, small), small.kept_layers, lora)
    accepted: list[tuple[Path, UpdateManifest]] = []
    refused: list[tuple[str, str]] = []
    for directory in updates:
        whose = asked[directory] if asked else None
        expected = Expected(small, architecture, lora, number, parent.digest if parent else None, whose, wire)
        try:
            manifest = validate_update(directory, expected)
            if manifest.client in {other.client for _, other in accepted}:
                raise UpdateRefusedError(f"{manifest.client} refused: it sent more than one update; the first counts.")
        except UpdateRefusedError as error:
            refused.append((whose.client if whose else client_name(directory), str(error)))
        else:
            accepted.append((directory, manifest))
    if len(accepted) < min_updates:
        causes = " ".join(cause for _, cause in refused)
        raise UpdateRefusedError(
            f"{len(accepted)} of {len(updates)} updates are valid; at least {min_updates} are needed. {causes}"
        )

    # The order in which updates arrive must not show in the bytes.
    accepted.sort(key=lambda item: item[1].client)
    weights = torch.tensor([getattr(manifest, weighting) for _, manifest in accepted], dtype=torch.float64)
    weights /= weights.sum()
    readers = [open_update(directory, expected) for directory, _ in accepted]
    all_factors = [{module: reader.read(module) for module in reader.modules} for reader in readers]
    result: dict[str, Factors] = {}
    energy = dropped = 0.0
    for module in sorted(all_factors[0]):
        aggregate = AGGREGATORS[aggregator](
            [factors[module] for factors in all_factors], weights, [lora.scale] * len(accepted), lora.rank, lora.scale
        )
        result[module] = aggregate.factors
        energy += aggregate.energy
        dropped += aggregate.dropped
    manifest = AdapterManifest(
        files={},
        base=small.base,
        package=small.digest,
        parent=parent.digest if parent else None,
        round=accepted[0][1].round,
        layers=small.kept_layers,
        lora=lora,
        aggregator=aggregator,
        weighting=weighting,
        contributions=[
            Contribution(
                client=update.client,
                digest=update.digest,
                weight=float(weight),
                examples=update.examples,
                tokens=update.tokens,
            )
            for (_, update), weight in zip(accepted, weights, strict=True)
        ],
        energy_dropped=dropped / energy if energy else 0.0,
    )
    return Collected(_write(output, result, manifest, architecture, overwrite), tuple(refused))


def _majority(
    updates: list[Path], package: PackageManifest, architecture: Architecture, round_number: int | None
) -> tuple[LoraSettings, int | None]:
    """The LoRA settings and the round, together, of most clients whose manifest fits what is known.

    Votes for another package, for another round than `round_number`, or for targets that the model lacks don't count.
    A tie goes to what comes first as canonical JSON, whatever the order of `updates`. Without a vote every update
    will be refused before its settings are looked at.
    """
    choices: dict[str, tuple[LoraSettings, int]] = {}
    votes: set[tuple[str, str]] = set()
    for directory in updates:
        try:
            manifest = read_update(directory)
            target_linears(architecture, manifest.lora)
        except (ArtifactError, ConfigError):
            continue  # `validate_update` will name it
        if manifest.package == package.digest and manifest.adapter is None and round_number in (None, manifest.round):
            choice = json.dumps([manifest.lora.model_dump(), manifest.round], sort_keys=True)
            choices[choice] = manifest.lora, manifest.round
            votes.add((manifest.client, choice))
    counts = Counter(choice for _, choice in votes)
    winner = min(counts, key=lambda choice: (-counts[choice], choice), default=None)
    return choices[winner] if winner is not None else (LoraSettings(), round_number)


def _read_previous(previous: Path, small: PackageManifest) -> AdapterManifest:
    manifest = read_manifest(previous, AdapterManifest)
    verify_files(previous, manifest, published=True)
    if manifest.package != small.digest:
        raise ArtifactError(
            f"{previous} belongs to the package {manifest.package[:12]}…; expected {small.digest[:12]}…."
        )
    return manifest


def _write(
    output: Path, factors: dict[str, Factors], manifest: AdapterManifest, architecture: Architecture, overwrite: bool
) -> AdapterManifest:
    with staged_directory(output, overwrite=overwrite) as staging:
        write_adapter(staging, factors, manifest.lora, architecture, manifest.base.id)
        manifest = manifest.model_copy(update={"files": describe_files(staging)})
        write_manifest(staging, manifest)
    return manifest
