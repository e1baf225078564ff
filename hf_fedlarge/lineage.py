"""Adapters from round to round: the first one, what the next has to go on with, and the manifest that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_fedlarge.adapters import initial_factors, write_adapter
from hf_fedlarge.aggregate import trained_in
from hf_fedlarge.architectures import describe
from hf_fedlarge.artifacts import (
    CONTROL_WEIGHTS,
    AdapterManifest,
    PackageManifest,
    describe_files,
    read_manifest,
    staged_directory,
    verify_files,
    write_manifest,
)
from hf_fedlarge.config import ON_FACTORS, AggregationSettings, LoraSettings, PrivacySettings
from hf_fedlarge.errors import ArtifactError, ConfigError
from hf_fedlarge.ledger import Draw, drawn_again
from hf_fedlarge.package import package_config
from hf_fedlarge.privacy import spent
from hf_fedlarge.scaffold import difference, write_control


def start_adapter(
    package: Path,
    output: Path,
    lora: LoraSettings,
    seed: int,
    *,
    aggregator: str = "exact",
    scaffold: bool = False,
    privacy: PrivacySettings | None = None,
    overwrite: bool = False,
) -> AdapterManifest:
    """Write the adapter that a federation starts from, round 0: it changes nothing yet, and is the same for all.

    `aggregator` is the one of round 1, which decides what its clients train; `scaffold` asks them to correct their
    steps, `privacy` to clip what they send.

    Raises:
        ArtifactError: `package` is not a package.
        ConfigError: `lora` names a target that the model lacks.
        OutputError: `output` exists or can't be written.
    """
    small = read_manifest(package, PackageManifest)
    architecture = describe(package_config(package))
    factors = initial_factors(architecture, small.kept_layers, lora, seed)
    with staged_directory(output, overwrite=overwrite) as staging:
        write_adapter(staging, factors, lora, architecture, small.base)
        if scaffold:
            write_control(staging, difference(factors, factors))
        return _sealed(
            staging,
            small,
            parent=None,
            round=0,
            lora=lora,
            aggregator=None,
            trains=trained_in(aggregator, 1),
            privacy=spent(privacy, []) if privacy else None,
        )


def read_previous(previous: Path, small: PackageManifest) -> AdapterManifest:
    """The manifest of an adapter that belongs to a package."""
    manifest = read_manifest(previous, AdapterManifest)
    verify_files(previous, manifest, published=True)
    if manifest.package != small.digest:
        raise ArtifactError(
            f"{previous} belongs to the package {manifest.package[:12]}…; expected {small.digest[:12]}…."
        )
    return manifest


def check_continues(previous: Path, parent: AdapterManifest, settings: AggregationSettings, number: int) -> None:
    """What clients were asked to train and what the server kept must be what the settings go on with."""
    name, optimizer = settings.aggregator, settings.server_optimizer
    trains = trained_in(name, number)
    if parent.trains != trains:
        raise ConfigError(
            f"{previous} asked its clients to train {parent.trains}; {name} expects {trains} in round {number}: go on "
            "with the aggregator that made it."
        )
    if settings.scaffold != (CONTROL_WEIGHTS in parent.files):
        raise ConfigError(f"{previous} was {'not ' if settings.scaffold else ''}made with scaffold; go on as it was.")
    before = parent.privacy.settings if parent.privacy else None
    if before != settings.privacy:
        raise ConfigError(f"{previous} was made with {before or 'no privacy'}; go on as it was.")
    if parent.carry_rank and name in ON_FACTORS:
        raise ConfigError(f"{previous} has a carry, which {name} would lose; go on with {parent.aggregator}.")
    if optimizer != "none" and parent.server_optimizer not in (None, optimizer):
        raise ConfigError(f"{previous} has averages of {parent.server_optimizer}, which {optimizer} can't go on with.")


def seal(
    staging: Path,
    package: PackageManifest,
    parent: AdapterManifest | None,
    lora: LoraSettings,
    number: int,
    settings: AggregationSettings,
    draw: Draw | None,
    **told: Any,
) -> AdapterManifest:
    """Write the manifest of the adapter that a round made, with its files.

    Args:
        staging: where the files are.
        package: what was trained on.
        parent: the adapter before.
        lora: the adapter's.
        number: the round.
        settings: how it was aggregated.
        draw: how many clients were asked, of how many, for `privacy`.
        told: other fields.
    """
    optimizer, private = settings.server_optimizer, settings.privacy
    return _sealed(
        staging,
        package,
        parent=parent.digest if parent else None,
        round=number,
        lora=lora,
        aggregator=settings.aggregator,
        weighting=settings.weighting,
        trains=trained_in(settings.aggregator, number + 1),
        server_optimizer=None if optimizer == "none" else optimizer,
        privacy=spent(private, drawn_again(parent.privacy.draws, draw)) if private else None,
        **told,
    )


def _sealed(staging: Path, package: PackageManifest, **fields: Any) -> AdapterManifest:
    about = {"base": package.base, "package": package.digest, "layers": package.kept_layers}
    manifest = AdapterManifest(files=describe_files(staging), **about, **fields)
    write_manifest(staging, manifest)
    return manifest
