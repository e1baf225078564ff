"""Collect a round's updates into the next adapter: validate each, refuse the bad by name, aggregate the rest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hf_fedlarge.adapters import AdapterReader, target_linears, write_config
from hf_fedlarge.architectures import Architecture, describe
from hf_fedlarge.artifacts import (
    CONTROL_WEIGHTS,
    AdapterManifest,
    PackageManifest,
    UpdateManifest,
    check_output,
    read_manifest,
    staged_directory,
)
from hf_fedlarge.combine import Part, combine
from hf_fedlarge.config import AggregationSettings, Codec, LoraSettings, first_problem
from hf_fedlarge.entries import Contribution
from hf_fedlarge.errors import ArtifactError, ConfigError, UpdateRefusedError
from hf_fedlarge.keys import AllowedKeys, read_allowed, read_signature
from hf_fedlarge.ledger import Draw
from hf_fedlarge.lineage import check_continues, read_previous, seal
from hf_fedlarge.package import package_architecture, package_config
from hf_fedlarge.scaffold import write_common
from hf_fedlarge.update import Asked, Expected, client_name, open_update, read_update, validate_update
from hf_fedlarge.weighting import weighing
from hf_fedlarge.wire import EncodedReader, Wire


@dataclass(frozen=True)
class _Base:
    """An adapter that updates may have started from, and what those must agree with."""

    directory: Path
    adapter: AdapterManifest
    expected: Expected


@dataclass(frozen=True)
class Collected:
    """The adapter's manifest, and who was refused with the reason."""

    manifest: AdapterManifest
    refused: tuple[tuple[str, str], ...]


def aggregate_updates(
    updates: list[Path],
    package: Path,
    output: Path,
    *,
    settings: AggregationSettings | None = None,
    previous: Path | None = None,
    older: Sequence[Path] = (),
    tiers: Mapping[Path, Path] | None = None,
    round_number: int | None = None,
    min_updates: int = 1,
    asked: Mapping[Path, Asked] | None = None,
    codec: Codec | None = None,
    population: int | None = None,
    keys: Path | None = None,
    draw: Draw | None = None,
    overwrite: bool = False,
    **choices: Any,
) -> Collected:
    """Validate updates and aggregate those that pass into an adapter in global layer numbers.

    The previous adapter says which LoRA settings and which round the updates must have. Without one it is what most
    of the updates' manifests agree on, so that one bad client can't decide it; see `_majority`.

    Args:
        updates: update directories; a client may send one.
        package: the package they were trained on.
        output: the adapter directory to make.
        settings: how to aggregate; None: as `choices` say, by default exactly and by tokens.
        previous: the adapter the clients started from; None: they started by themselves.
        older: adapters of earlier rounds; an update that started from one of them counts for less.
        tiers: adapters that `tiers.derive_adapter` made of `previous`, and the packages that their clients train.
        round_number: the round they must be for; None: the one after `previous`, or that of the majority.
        min_updates: fewer valid updates than this make no adapter, nor do fewer than the aggregator needs.
        asked: for each of `updates`, whose it must be and the most that client can have trained on; None: not known.
        codec: how the updates must be encoded; None: fp32. Any other needs `previous`, which their changes are from.
        population: how many clients the federation has, for `scaffold`; None: those that sent these updates.
        keys: the list of keys that must have signed the updates; None: they need not be signed, or were checked before.
        draw: how many clients were asked, of how many, for `privacy`, which says what that spent.
        overwrite: replace an adapter that is there already.
        choices: fields of `AggregationSettings`, such as `aggregator` and `weighting`.

    Raises:
        UpdateRefusedError: too few were valid; each refusal is in the message, and nothing is written.
        ConfigError: settings that don't fit together or to the previous adapter, or no update given, or a codec without
            `previous`, or `keys` is no list.
        ArtifactError: the package or an adapter is not what it should be.
        OutputError: `output` exists or can't be written.
    """
    settings = settings or choose(**choices)
    weigh = weighing(settings.weighting)
    if not updates:
        raise ConfigError("No update was given; expected at least one update directory.")
    codec = codec or Codec()
    if codec.name != "fp32" and previous is None:
        raise ConfigError(f"The codec {codec.name} needs --adapter, the adapter that the updates started from.")
    if settings.scaffold and (previous is None or older or codec.name != "fp32"):
        raise ConfigError("scaffold needs --adapter, whole updates in fp32, and none that came late.")
    if settings.privacy and (previous is None or older or draw is None):
        raise ConfigError("privacy needs --adapter, the draw of the cohort, and no update that came late.")
    if older and settings.aggregator == "alternate":
        raise ConfigError("alternate can't take late updates: they trained beside another factor than the newest's.")
    check_output(output, overwrite)
    allowed = read_allowed(keys) if keys else None
    small = read_manifest(package, PackageManifest)
    architecture = describe(package_config(package))
    parent = read_previous(previous, small) if previous else None
    if parent:
        lora, number = parent.lora, parent.round + 1 if round_number is None else round_number
        check_continues(previous, parent, settings, number)
    else:
        lora, number = _majority(updates, small, architecture, round_number, allowed)
    bases: dict[str | None, _Base] = {}
    for directory, manifest, trained in _started_from(previous, parent, older, tiers or {}, package, small):
        its_round = number + manifest.round - parent.round
        expected = expected_from(directory, manifest, trained, its_round, codec)
        bases[manifest.digest] = _Base(directory, manifest, expected)
    started_by_themselves = Expected(small, architecture, lora, number)
    accepted: list[tuple[Path, UpdateManifest, float]] = []
    readers: dict[Path, AdapterReader | EncodedReader] = {}
    refused: list[tuple[str, str]] = []
    for directory in updates:
        whose = asked[directory] if asked else None
        base = bases.get(_claimed_base(directory)) or bases.get(parent.digest if parent else None)
        expected = replace(base.expected if base else started_by_themselves, asked=whose, keys=allowed)
        try:
            manifest = validate_update(directory, expected)
            if manifest.client in {other.client for _, other, _ in accepted}:
                raise UpdateRefusedError(f"{manifest.client} refused: it sent more than one update; the first counts.")
            readers[directory] = open_update(directory, expected)
            accepted.append((directory, manifest, weigh(manifest)))
        except UpdateRefusedError as error:
            refused.append((whose.client if whose else client_name(directory), str(error)))
    needed = max(min_updates, settings.fewest_updates)
    if len(accepted) < needed:
        causes = " ".join(cause for _, cause in refused)
        why = f" for {settings.aggregator}" if needed > min_updates else ""
        raise UpdateRefusedError(
            f"{len(accepted)} of {len(updates)} updates are valid; at least {needed} are needed{why}. {causes}"
        )

    if settings.privacy and len(accepted) > draw.cohort:
        raise ConfigError(f"{len(accepted)} updates came of a cohort of {draw.cohort}; privacy divides by the cohort.")

    # The order in which updates arrive must not show in the bytes.
    accepted.sort(key=lambda item: item[1].client)
    parts = []
    for directory, update, weight in accepted:
        base = bases.get(update.adapter)
        late = parent.round - base.adapter.round if base else 0
        own = base.directory if base and base.adapter.digest != parent.digest else None
        parts.append(Part(readers[directory], weight, update.lora.scale, own, late))
    with staged_directory(output, overwrite=overwrite) as staging:
        trained, cohort = parent.trains if parent else "both", draw.cohort if draw else None
        combined = combine(parts, previous, staging, lora, settings, trained, cohort)
        write_config(staging, combined.modules, lora, architecture, small.base)
        if settings.scaffold:
            write_common(staging, previous, [directory for directory, _, _ in accepted], population or len(accepted))
        told = {
            "contributions": [
                Contribution(
                    client=update.client,
                    digest=update.digest,
                    weight=share,
                    examples=update.examples,
                    tokens=update.tokens,
                    staleness=part.late,
                )
                for (_, update, _), share, part in zip(accepted, combined.shares, parts, strict=True)
            ],
            "energy_dropped": combined.dropped,
            "energy_carried": combined.carried,
            "carry_rank": combined.carry_rank,
        }
        if settings.privacy:  # nothing that comes from single clients without noise
            told = {}
        return Collected(seal(staging, small, parent, lora, number, settings, draw, **told), tuple(refused))


def expected_from(
    directory: Path, adapter: AdapterManifest, package: Path, round_number: int, codec: Codec
) -> Expected:
    """What an update for a round must agree with, whoever sends it, if its client started from this adapter.

    Args:
        directory, adapter: the adapter and its manifest.
        package: what the client trains.
        round_number: the round that the update is for.
        codec: how it is encoded.
    """
    small = read_manifest(package, PackageManifest)
    frozen = {"A": "B", "B": "A"}.get(adapter.trains)
    wire = None
    if codec.name != "fp32":
        architecture = package_architecture(package, small)
        wire = Wire(codec, AdapterReader(directory), architecture, small.kept_layers, adapter.lora)
    return Expected(
        small,
        describe(package_config(package)),
        adapter.lora,
        round_number,
        adapter.digest,
        frozen=(frozen, AdapterReader(directory)) if frozen else None,
        wire=wire,
        control=CONTROL_WEIGHTS in adapter.files,
    )


def choose(**choices: Any) -> AggregationSettings:
    """Settings from single choices.

    Raises:
        ConfigError: one is not known, or they don't fit together.
    """
    try:
        return AggregationSettings(**choices)
    except ValidationError as error:
        raise ConfigError(f"These aggregation settings are wrong: {first_problem(error)}.") from error


def _claimed_base(directory: Path) -> str | None:
    try:
        return read_update(directory).adapter
    except ArtifactError:
        return None  # `validate_update` will say why


def _started_from(
    previous: Path | None,
    parent: AdapterManifest | None,
    older: Sequence[Path],
    tiers: Mapping[Path, Path],
    package: Path,
    small: PackageManifest,
) -> Iterator[tuple[Path, AdapterManifest, Path]]:
    """The adapters that updates may have started from, with the package that was trained then."""
    if parent is None:
        if older:
            raise ConfigError("Older adapters were given without the newest one; give --adapter, too.")
    else:
        yield previous, parent, package
    for directory in older:
        manifest = read_previous(directory, small)
        if manifest.lora != parent.lora or manifest.trains != parent.trains or manifest.round >= parent.round:
            raise ConfigError(
                f"{directory} is of round {manifest.round}, {manifest.lora}, for training {manifest.trains}; expected "
                f"a round before {parent.round}, {parent.lora}, for training {parent.trains}."
            )
        yield directory, manifest, package
    for directory, own in tiers.items():
        manifest = read_previous(directory, read_manifest(own, PackageManifest))
        if parent is None or manifest.parent != parent.digest:
            raise ConfigError(f"{directory} is not a tier's part of the adapter before; derive it from that one.")
        yield directory, manifest, own


def _majority(
    updates: list[Path],
    package: PackageManifest,
    architecture: Architecture,
    round_number: int | None,
    allowed: AllowedKeys | None,
) -> tuple[LoraSettings, int | None]:
    """The LoRA settings and the round, together, of most clients whose manifest fits what is known.

    Votes for another package, for another round than `round_number`, for targets that the model lacks, or without a
    signature where `allowed` wants one, don't count.
    A tie goes to what comes first as canonical JSON, whatever the order of `updates`. Without a vote every update
    will be refused before its settings are looked at.
    """
    choices: dict[str, tuple[LoraSettings, int]] = {}
    votes: set[tuple[str, str]] = set()
    for directory in updates:
        try:
            manifest = read_update(directory)
            target_linears(architecture, manifest.lora)
            if allowed:
                allowed.check(manifest, read_signature(directory))
        except (ArtifactError, ConfigError):
            continue  # `validate_update` will name it
        if manifest.package == package.digest and manifest.adapter is None and round_number in (None, manifest.round):
            choice = json.dumps([manifest.lora.model_dump(), manifest.round], sort_keys=True)
            choices[choice] = manifest.lora, manifest.round
            votes.add((manifest.client, choice))
    counts = Counter(choice for _, choice in votes)
    winner = min(counts, key=lambda choice: (-counts[choice], choice), default=None)
    return choices[winner] if winner is not None else (LoraSettings(), round_number)
