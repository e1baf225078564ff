"""A client's update: written by the client, trusted by nobody.

Validation happens here and nowhere else, before any arithmetic, in the order of what it costs: the manifest, its
parents, the set of files, their sizes and digests, the header of the one safetensors file (bounded, its exact names,
shapes and dtypes), and only then the numbers. `adapter_config.json` is one of the two files a client may send, but it
is never parsed: what the adapter is stands in the manifest that the server checks against its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_fedlarge.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    expected_shapes,
    read_factors,
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
from hf_fedlarge.errors import ArtifactError, UpdateRefusedError
from hf_fedlarge.tensors import Factors, read_header

MAX_HEADER_BYTES = 8 * 2**20
MAX_CONFIG_BYTES = 2**20
# What one round of one client can't exceed; beyond it a weight is a mistake or an attack.
MAX_EXAMPLES = 10**9
MAX_TOKENS = 10**12


@dataclass(frozen=True)
class Expected:
    """What the server knows and an update must agree with; `round` or `adapter` None: any."""

    package: PackageManifest
    architecture: Architecture
    lora: LoraSettings
    round: int | None = None
    adapter: str | None = None


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
        UpdateRefusedError: with the client (or the directory, while the client is unknown) and the cause.
    """
    try:
        manifest = read_manifest(directory, UpdateManifest)
    except ArtifactError as error:
        raise UpdateRefusedError(f"{directory.name} refused: {error}") from error

    def refuse(cause: str) -> UpdateRefusedError:
        return UpdateRefusedError(f"{manifest.client} refused: {cause}")

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
    if manifest.lora != expected.lora:
        raise refuse(f"its LoRA settings are {manifest.lora}; expected {expected.lora}.")
    if not 1 <= manifest.examples <= MAX_EXAMPLES or not 1 <= manifest.tokens <= MAX_TOKENS:
        raise refuse(
            f"it claims {manifest.examples} examples and {manifest.tokens} tokens; expected 1 to {MAX_EXAMPLES} "
            f"and 1 to {MAX_TOKENS}."
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
    except ArtifactError as error:
        raise refuse(str(error)) from error
    for name in sorted(set(infos) ^ set(shapes)):
        raise refuse(f"its tensor {name[:200]!r} is {'not expected' if name in infos else 'missing'}.")
    for name, info in infos.items():
        if info.shape != shapes[name] or info.dtype != torch.float32:
            raise refuse(f"its tensor {name} is {info.dtype} {info.shape}; expected torch.float32 {shapes[name]}.")
    for module, (A_RI, B_OR) in read_factors(directory).items():
        if not (torch.isfinite(A_RI).all() and torch.isfinite(B_OR).all()):
            raise refuse(f"its factors of {module} hold NaN or infinity.")
    return manifest


def client_name(directory: Path) -> str:
    """Whom to name for a directory whose update was refused: the client if the manifest is readable, else its name."""
    try:
        return read_manifest(directory, UpdateManifest).client
    except ArtifactError:
        return directory.name


def _check_header(path: Path) -> None:
    """What safetensors lets pass: a huge header, and a key that stands twice in it."""
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
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path.name} has a header that is not JSON.") from error


def _short(digest: str | None) -> str:
    return f"{digest[:12]}…" if digest else "none"
