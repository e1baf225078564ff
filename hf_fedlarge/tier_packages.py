"""A run's packages, one for each tier: planned and found good before its settings hold, made afterwards.

Clients of less memory get smaller ones (`FederationConfig.tiers`); without tiers there is one for everybody.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from hf_fedlarge.adapters import target_linears
from hf_fedlarge.architectures import describe, load_config
from hf_fedlarge.artifacts import PackageManifest, read_manifest, staged_directory, verify_files, write_manifest
from hf_fedlarge.budget import parse_bytes
from hf_fedlarge.calibrate import check_plan, make_package, plan_package
from hf_fedlarge.coherence import TRAINING_DEFAULTS
from hf_fedlarge.config import FederationConfig, LoraSettings, PackageSettings
from hf_fedlarge.errors import ArtifactError, ConfigError
from hf_fedlarge.positions import check_length
from hf_fedlarge.progress import by_tenths
from hf_fedlarge.tensors import checkpoint_digest
from hf_fedlarge.tiers import client_bytes, describe_fit, fit_memory


@dataclass(frozen=True)
class Tier:
    """What clients of at least `memory_bytes` that are too small, or too slow, for the tier before work with.

    Of several the first one's `memory_bytes` is the estimate of what its clients need, and that of the others what the
    file says. Where there is one for everybody it is 0: a package is memory-mapped, and with how little memory it can
    be trained on is a client's own to try (`--memory-budget`), which gives no update and a reason where it can't.
    """

    name: str
    package: Path
    lora: LoraSettings
    memory_bytes: int

    @cached_property
    def manifest(self) -> PackageManifest:
        """The package's."""
        return read_manifest(self.package, PackageManifest)


class _Wanted(NamedTuple):
    """A tier below the first: what its package is made of, its adapter, and a line if it was planned."""

    name: str
    package: PackageSettings
    lora: LoraSettings
    memory_bytes: int
    line: str | None


def check_packages(checkpoint: Path, config: FederationConfig) -> None:
    """Refuse what packages, the first adapter, training or evaluation would, before anything is computed for hours.

    Where a package is given, it must be of this checkpoint, which is read whole for its digest.

    How large the first package becomes is not known yet, so its weights alone are taken for it.

    Raises:
        FedLargeError: as they do.
    """
    if config.package:
        base, found = read_manifest(Path(config.package), PackageManifest).base, checkpoint_digest(checkpoint)
        if base.digest != found:
            raise ArtifactError(
                f"{config.package} is a package of {base.id} with the digest {base.digest[:12]}…, but {checkpoint} has "
                f"the digest {found[:12]}…; give the package of this checkpoint."
            )
        architecture = describe(load_config(checkpoint))
    else:
        plan = check_plan(checkpoint, config)
        architecture = plan.architecture
    target_linears(architecture, config.lora)
    check_length(architecture.model_type, architecture.positions, max_length(config.training))
    if config.tiers:  # for which packages are made
        needed = _first_bytes(checkpoint, config, len(plan.kept), plan.package_bytes)
        for tier in _wanted(checkpoint, config, needed):
            check_plan(checkpoint, tier.package)


def make_tier_package(
    checkpoint: Path,
    config: FederationConfig,
    settings: PackageSettings,
    directory: Path,
    revision: str | None,
    report: Callable[[str], None],
) -> None:
    """Make one package, with a line now and then: a large model takes hours. One that is given is copied.

    Args:
        checkpoint: the full model's directory.
        config: the run's.
        settings: the package's own.
        directory: to make.
        revision: of the Hub, that the checkpoint came from.
        report: told of the plan, and of layers that are done.

    Raises:
        FedLargeError: as `make_package`, or the given package is none, or damaged.
    """
    if config.package:
        source = Path(config.package)
        manifest = read_manifest(source, PackageManifest)
        with staged_directory(directory) as staging:
            for name in manifest.files:
                shutil.copy2(source / name, staging / name)
            verify_files(staging, manifest)  # it may have changed since it was looked at
            write_manifest(staging, manifest)
        report(f"package {source}: {manifest.total_bytes / 1e6:.1f} MB, digest {manifest.digest[:12]}")
        return
    layers = load_config(checkpoint).num_hidden_layers
    plan = plan_package(checkpoint, settings, by_tenths(report, "choosing", layers))
    report(plan.describe())
    base_id = config.base_id or (config.checkpoint if revision else None)
    fitting = by_tenths(report, "fitting", layers)
    make_package(plan, settings, directory, base_id=base_id, revision=revision, fitting=fitting)


def make_tiers(
    checkpoint: Path, config: FederationConfig, run: Path, revision: str | None, report: Callable[[str], None]
) -> list[Tier]:
    """Make the packages of the smaller tiers that are not there yet, and list all tiers, the largest first.

    A tier without a size of its own gets the best package and the highest rank that fit into its memory.

    Raises:
        FedLargeError: a tier that needs more than the one above it, or nothing that fits.
    """
    package = run / "package"
    first = read_manifest(package, PackageManifest)
    if not config.tiers:
        return [Tier("", package, config.lora, memory_bytes=0)]
    needed = _first_bytes(checkpoint, config, len(first.kept_layers), first.total_bytes)
    tiers = [Tier("", package, config.lora, needed)]
    for name, own, lora, memory, line in _wanted(checkpoint, config, needed):
        if line:
            report(line)
        directory = run / "packages" / name
        if not directory.exists():
            make_tier_package(checkpoint, config, own, directory, revision, report)
        tiers.append(Tier(name, directory, lora, memory))
    return tiers


def _first_bytes(checkpoint: Path, config: FederationConfig, layers: int, package_bytes: int) -> int:
    """What a client with the first package needs."""
    full, longest = describe(load_config(checkpoint)), max_length(config.training)
    tokens, together = batch(config.training) * longest, micro_batch(config.training) * longest
    return client_bytes(full, layers, package_bytes, config.lora, tokens, together)


def _wanted(checkpoint: Path, config: FederationConfig, needed_above: int) -> Iterator[_Wanted]:
    """The tiers below the first, the largest first."""
    longest = max_length(config.training)
    tokens, together = batch(config.training) * longest, micro_batch(config.training) * longest
    for name, settings in sorted(config.tiers.items(), key=lambda item: -parse_bytes(item[1].memory)):
        memory, line = parse_bytes(settings.memory), None
        lora = config.lora.model_copy(update={"rank": settings.rank or config.lora.rank})
        kept = {"keep_layers": settings.keep_layers, "keep_neurons": settings.keep_neurons}
        if memory >= needed_above:
            raise ConfigError(
                f"The tier {name} is for {memory / 1e6:.0f} MB, but the one above it needs no more than "
                f"{needed_above / 1e6:.0f} MB; leave it out or lower its memory."
            )
        if kept == {"keep_layers": None, "keep_neurons": None}:
            fit = fit_memory(checkpoint, memory, tokens, lora, config.embeddings, together)
            kept = {"keep_layers": fit.keep_layers, "keep_neurons": fit.keep_neurons}
            lora = lora.model_copy(update={"rank": fit.rank})
            line = f"tier {name} {describe_fit(fit, memory, tokens)}"
        own = PackageSettings(**{field: getattr(config, field) for field in PackageSettings.model_fields} | kept)
        yield _Wanted(name, own, lora, memory, line)
        needed_above = memory


def batch(training: dict[str, Any]) -> int:
    """Sequences of one optimizer step."""
    return micro_batch(training) * (TRAINING_DEFAULTS | training)["gradient_accumulation_steps"]


def micro_batch(training: dict[str, Any]) -> int:
    """Sequences that are computed together."""
    return (TRAINING_DEFAULTS | training)["per_device_train_batch_size"]


def max_length(training: dict[str, Any]) -> int:
    """Tokens of a sequence at the most."""
    return (TRAINING_DEFAULTS | training)["max_length"]
