"""A client's update: written by the client, trusted by nobody.

Validation happens here and nowhere else, before any arithmetic, in the order of what it costs: the manifest, its
parents, the set of files, their sizes and digests, the header of the one safetensors file (bounded, its exact names,
shapes and dtypes), and only then the numbers. `adapter_config.json` is one of the two files a client may send, but it
is never parsed: what the adapter is stands in the manifest that the server checks against its own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hf_fedlarge.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterReader,
    expected_shapes,
    read_factors,
    target_linears,
    tensor_shapes,
    write_adapter,
)
from hf_fedlarge.architectures import Architecture
from hf_fedlarge.artifacts import (
    PackageManifest,
    UpdateManifest,
    describe_files,
    read_manifest,
    staged_directory,
    verify_files,
    write_manifest,
)
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.errors import ArtifactError, ConfigError, UpdateRefusedError
from hf_fedlarge.tensors import Factors, read_header

MAX_HEADER_BYTES = 8 * 2**20
MAX_CONFIG_BYTES = 2**20
# What one round of one client can't exceed; beyond it a weight is a mistake or an attack. `Asked` knows better.
MAX_EXAMPLES = 10**9
MAX_TOKENS = 10**12
# Frobenius norm of one A or B. Training stays below 10**3; finite factors near fp32's end have products beyond it.
MAX_NORM = 1e6


@dataclass(frozen=True)
class Asked:
    """Which client was asked for an update, and the most examples and tokens it can have trained on."""

    client: str
    examples: int
    tokens: int


@dataclass(frozen=True)
class Expected:
    """What the server knows and an update must agree with.

    Attributes:
        package: the manifest of what was trained on.
        architecture: that package's.
        lora: the round's settings.
        round: None: any.
        adapter: digest of the adapter that clients started from; None: they started by themselves.
        asked: whose update it must be; None: anybody's, up to `MAX_EXAMPLES` and `MAX_TOKENS`.
        frozen: the factor that clients were not to train, and the adapter whose own it must be; None: they train both.
    """

    package: PackageManifest
    architecture: Architecture
    lora: LoraSettings
    round: int | None = None
    adapter: str | None = None
    asked: Asked | None = None
    frozen: tuple[Literal["A", "B"], AdapterReader] | None = None


def write_update(
    output: Path,
    factors: dict[str, Factors],
    manifest: UpdateManifest,
    architecture: Architecture,
    base_id: str,
    *,
    overwrite: bool = False,
) -> UpdateManifest:
    """Write an update directory; `manifest.files` is filled in.

    Raises:
        OutputError: `output` exists or can't be written.
    """
    with staged_directory(output, overwrite=overwrite) as staging:
        write_adapter(staging, factors, manifest.lora, architecture, base_id)
        manifest = manifest.model_copy(update={"files": describe_files(staging)})
        write_manifest(staging, manifest)
    return manifest


def validate_update(directory: Path, expected: Expected) -> UpdateManifest:
    """Check everything about an update; what returns may be read with `read_factors`.

    Raises:
        UpdateRefusedError: with the cause, and whom it concerns: the client asked, else the client that the manifest
            names, else the directory.
    """
    try:
        manifest = read_update(directory)
    except ArtifactError as error:
        name = expected.asked.client if expected.asked else directory.name
        raise UpdateRefusedError(f"{name} refused: {error}") from error
    asked = expected.asked or Asked(manifest.client, MAX_EXAMPLES, MAX_TOKENS)

    def refuse(cause: str) -> UpdateRefusedError:
        return UpdateRefusedError(f"{asked.client} refused: {cause:.1000}")

    if manifest.client != asked.client:
        raise refuse(f"its update is signed {manifest.client}; expected {asked.client}, the client that was asked.")
    package = expected.package
    if manifest.package != package.digest:
        raise refuse(
            f"it was trained on the package {manifest.package[:12]}…; expected {package.digest[:12]}…, so train again."
        )
    if expected.round is not None and manifest.round != expected.round:
        raise refuse(f"it is for round {manifest.round}; expected round {expected.round}.")
    if manifest.adapter != expected.adapter:
        raise refuse(
            f"it started from the adapter {_short(manifest.adapter)}; expected {_short(expected.adapter)}, "
            "the state before this round."
        )
    try:
        target_linears(expected.architecture, manifest.lora)
    except ConfigError as error:
        raise refuse(str(error)) from error
    if manifest.lora != expected.lora:
        raise refuse(f"its LoRA settings are {manifest.lora}; expected {expected.lora}.")
    if not 1 <= manifest.examples <= asked.examples or not 1 <= manifest.tokens <= asked.tokens:
        raise refuse(
            f"it claims {manifest.examples} examples and {manifest.tokens} tokens; expected 1 to {asked.examples} "
            f"and 1 to {asked.tokens}."
        )
    if set(manifest.files) != {ADAPTER_WEIGHTS, ADAPTER_CONFIG}:
        raise refuse(
            f"its files are {sorted(manifest.files)}; only {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} may be sent."
        )
    shapes = tensor_shapes(expected_shapes(expected.architecture, package.kept_layers, expected.lora))
    bound = sum(rows * columns for rows, columns in shapes.values()) * 4 + MAX_HEADER_BYTES
    if manifest.files[ADAPTER_WEIGHTS].size > bound or manifest.files[ADAPTER_CONFIG].size > MAX_CONFIG_BYTES:
        raise refuse(f"its files have {manifest.total_bytes} bytes; this adapter needs at most {bound}.")
    try:
        verify_files(directory, manifest)
        _check_header(directory / ADAPTER_WEIGHTS)
        infos = read_header(directory / ADAPTER_WEIGHTS)
    except (ArtifactError, OSError) as error:
        raise refuse(str(error)) from error
    for name in sorted(set(infos) ^ set(shapes)):
        raise refuse(f"its tensor {name[:200]!r} is {'not expected' if name in infos else 'missing'}.")
    for name, info in infos.items():
        if info.shape != shapes[name] or info.dtype != torch.float32:
            raise refuse(f"its tensor {name} is {info.dtype} {info.shape}; expected torch.float32 {shapes[name]}.")
    for module, factors in read_factors(directory).items():
        for letter, factor in zip("AB", factors, strict=True):
            norm = torch.linalg.vector_norm(factor, dtype=torch.float64).item()
            if not math.isfinite(norm):
                raise refuse(f"its {letter} of {module} holds NaN or infinity.")
            if norm > MAX_NORM:
                raise refuse(f"its {letter} of {module} has the norm {norm:.3g}; expected at most {MAX_NORM:g}.")
            if expected.frozen and expected.frozen[0] == letter:
                before = expected.frozen[1].read(module)["AB".index(letter)]
                if not torch.equal(factor, before):
                    raise refuse(f"its {letter} of {module} is not its adapter's; this round freezes every {letter}.")
    return manifest


def read_update(directory: Path) -> UpdateManifest:
    """An update's manifest, of which only the form was checked.

    Raises:
        ArtifactError: not an update, or the system can't read it.
    """
    try:
        return read_manifest(directory, UpdateManifest)
    except OSError as error:
        raise ArtifactError(f"{directory} can't be read ({error}); expected an update: send it again.") from error


def measured(update: Path) -> dict[str, float]:
    """What a client's process measured; nothing where its manifest can't be read, which validation will say."""
    try:
        return read_manifest(update, UpdateManifest).measured
    except ArtifactError:
        return {}


def outcome(update: Path) -> str:
    """A trained client in a few words."""
    try:
        manifest = read_manifest(update, UpdateManifest)
    except ArtifactError as error:
        return str(error)
    if manifest.loss_before is None or manifest.loss_after is None:
        loss = "loss not evaluated"
    else:
        loss = f"its held-out loss {manifest.loss_before:.3f} → {manifest.loss_after:.3f}"
    seconds, peak = (manifest.measured.get(name, 0) for name in ("seconds", "peak_memory_bytes"))
    return f"{loss}, {manifest.tokens} tokens, {seconds:.0f} s, peak memory {peak / 1e6:.0f} MB"


def client_name(directory: Path) -> str:
    """Whom to name for a directory whose update was refused: the client if the manifest is readable, else its name."""
    try:
        return read_update(directory).client
    except ArtifactError:
        return directory.name


def _check_header(path: Path) -> None:
    """What safetensors lets pass: a huge header, a key that stands twice in it, a number of thousands of digits."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, path.stat().st_size):
            raise ArtifactError(f"{path.name} announces a header of {length} bytes; at most {MAX_HEADER_BYTES}.")
        raw = file.read(length)

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise ArtifactError(f"{path.name} holds a key twice in its header.")
        return dict(pairs)

    try:
        json.loads(raw, object_pairs_hook=unique)
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path.name} has a header that can't be read as JSON; expected safetensors.") from error


def _short(digest: str | None) -> str:
    return f"{digest[:12]}…" if digest else "none"
