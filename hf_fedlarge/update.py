"""A client's update: written by the client, trusted by nobody.

Validation happens here and nowhere else, before any arithmetic, in the order of what it costs: manifest, signature,
parents, the set of files, their sizes and digests, the header of the one safetensors file (bounded, its exact names,
shapes and dtypes), then the numbers. `adapter_config.json` is never parsed: what counts stands in the manifest.

An update in fp32 is an ordinary PEFT adapter; in any other codec it is one file that holds what changed (`wire.py`).
"""

from __future__ import annotations

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
    factor_name,
    target_linears,
    tensor_shapes,
    write_adapter,
)
from hf_fedlarge.architectures import Architecture
from hf_fedlarge.artifacts import (
    CONTROL_WEIGHTS,
    MANIFEST_NAME,
    PackageManifest,
    UpdateManifest,
    describe_files,
    read_manifest,
    staged_directory,
    verify_files,
    write_manifest,
)
from hf_fedlarge.codec import Layout, decode, encode
from hf_fedlarge.config import Codec, LoraSettings
from hf_fedlarge.entries import BaseModelEntry
from hf_fedlarge.errors import ArtifactError, ConfigError, UpdateRefusedError
from hf_fedlarge.feedback import Lost, write_lost
from hf_fedlarge.fixed_point import WORD_BYTES
from hf_fedlarge.keys import SIGNATURE_NAME, AllowedKeys, PrivateKey, read_signature, sign_update
from hf_fedlarge.quantize import Infos
from hf_fedlarge.scaffold import write_control
from hf_fedlarge.tensors import Factors, file_bytes, header_bytes, read_header
from hf_fedlarge.untrusted import parse_json, printable
from hf_fedlarge.wire import ENCODED_WEIGHTS, EncodedReader, Wire, rank_first, write_encoded

MASKED_WORDS = "masked.bin"
# What comes on top of `update_bytes`: the manifest, adapter_config.json, and a longer header than ours; each.
MAX_SMALL_BYTES = UpdateManifest.max_bytes
# What one round of one client can't exceed; beyond it a weight is a mistake or an attack. `Asked` knows better.
MAX_EXAMPLES = 10**9
MAX_TOKENS = 10**12
# Frobenius norm of one A or B. Training stays below 10**3; finite factors near fp32's end have products beyond it.
MAX_NORM = 1e6
Frozen = tuple[Literal["A", "B"], AdapterReader]


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
        wire: the codec that updates must have, and their parent; None: fp32, as plain adapters.
        control: whether they bring what changed in their client's control variate (`scaffold.py`).
        keys: one of which must have signed it; None: nobody need have.
        words: how many numbers of 32 bits it must be, masked; None: it must not be masked.
    """

    package: PackageManifest
    architecture: Architecture
    lora: LoraSettings
    round: int | None = None
    adapter: str | None = None
    asked: Asked | None = None
    frozen: Frozen | None = None
    wire: Wire | None = None
    control: bool = False
    keys: AllowedKeys | None = None
    words: int | None = None


def write_update(
    output: Path,
    factors: dict[str, Factors],
    manifest: UpdateManifest,
    architecture: Architecture,
    base: BaseModelEntry,
    *,
    overwrite: bool = False,
    wire: Wire | None = None,
    lost: dict[str, Factors] | None = None,
    state: Path | None = None,
    control: dict[str, Factors] | None = None,
    key: PrivateKey | None = None,
) -> UpdateManifest:
    """Write an update directory; `manifest.files` is filled in.

    Args:
        output: the directory to make.
        factors: module → fp32 factors after training.
        manifest: what was trained; its codec is `wire`'s.
        architecture, base: for the PEFT adapter that an update in fp32 is.
        overwrite: replace an update that is there already.
        wire: how to encode; None: fp32.
        lost: what training started with beyond `wire.parent`, as `feedback.read_lost` gave it.
        state: the client's directory for what the codec loses; None: it is forgotten.
        control: what changed in its control variate, where it has one.
        key: signs the update; None: it is not signed.

    Raises:
        OutputError: `output` exists or can't be written.
        OSError: `state` can't be written.
    """
    assert manifest.codec == (wire.codec if wire else Codec())
    if wire:
        encoded, now_lost = _encode(factors, wire, lost or {})
        if state:  # before the update: a client killed in between does the round again, from the file before this one
            write_lost(state, manifest.package, manifest.round, now_lost)
    with staged_directory(output, overwrite=overwrite) as staging:
        if wire:
            write_encoded(staging / ENCODED_WEIGHTS, encoded, wire)
        else:
            write_adapter(staging, factors, manifest.lora, architecture, base)
        if control:
            write_control(staging, control)
        manifest = manifest.model_copy(update={"files": describe_files(staging)})
        write_manifest(staging, manifest)
        if key:
            sign_update(staging, manifest, key)
    return manifest


def _encode(
    factors: dict[str, Factors], wire: Wire, lost: dict[str, Factors]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Lost]]:
    """The parts of each factor that training changed, by its name; and what each module's encoding lost."""
    encoded: dict[str, dict[str, torch.Tensor]] = {}
    now_lost = {}
    for module in wire.shapes:
        parents = wire.parent_factors(module)
        carried = lost.get(module) or Factors(*map(torch.zeros_like, parents))
        received, missing = [], []
        for letter, trained, parent, before in zip("AB", factors[module], parents, carried, strict=True):
            if torch.equal(trained, parent + before):  # frozen: it has to arrive as it was
                received.append(parent)
                missing.append(before)
                continue
            change = trained - parent
            change_RX = change if letter == "A" else change.T
            parts = encoded[factor_name(module, letter)] = encode(change_RX, wire.codec)
            decoded_RX = decode(parts, wire.codec, tuple(change_RX.shape))
            received.append(parent + (decoded_RX if letter == "A" else decoded_RX.T))
            missing.append(trained - received[-1])
        now_lost[module] = Lost(Factors(*missing), received[0])
    return encoded, now_lost


def open_update(directory: Path, expected: Expected) -> AdapterReader | EncodedReader:
    """The factors of an update that `validate_update` accepted, in whichever codec, one module at a time."""
    if expected.wire is None:
        return AdapterReader(directory)
    return EncodedReader(directory / ENCODED_WEIGHTS, expected.wire)


def validate_update(directory: Path, expected: Expected) -> UpdateManifest:
    """Check everything about an update; what returns may be read with `open_update`.

    Raises:
        UpdateRefusedError: with the cause, and whom it concerns: the client asked, else the client that the manifest
            names, else the directory.
    """
    name = expected.asked.client if expected.asked else directory.name

    def refuse(cause: str) -> UpdateRefusedError:
        return UpdateRefusedError(printable(f"{name} refused: {cause:.1000}"))

    try:
        manifest = read_update(directory)
        asked = expected.asked or Asked(manifest.client, MAX_EXAMPLES, MAX_TOKENS)
        name = asked.client
        if manifest.client != asked.client:
            raise ArtifactError(
                f"its update is in the name of {manifest.client}; expected {asked.client}, the client that was asked."
            )
        signature = read_signature(directory)
        if expected.keys:
            expected.keys.check(manifest, signature)
    except (ArtifactError, OSError) as error:
        raise refuse(str(error)) from error
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
    if expected.words is not None or manifest.roster is not None:
        try:
            _check_masked(directory, manifest, expected.words)
        except (ArtifactError, OSError) as error:
            raise refuse(str(error)) from error
        return manifest
    if not 1 <= manifest.examples <= asked.examples or not 1 <= manifest.tokens <= asked.tokens:
        raise refuse(
            f"it claims {manifest.examples} examples and {manifest.tokens} tokens; expected 1 to {asked.examples} "
            f"and 1 to {asked.tokens}."
        )
    codec = expected.wire.codec if expected.wire else Codec()
    if manifest.codec != codec:
        raise refuse(f"it is encoded in {_spell(manifest.codec)}; this round takes {_spell(codec)}.")
    weights, names = ADAPTER_WEIGHTS, {ADAPTER_WEIGHTS, ADAPTER_CONFIG}
    if expected.wire:
        weights, names = ENCODED_WEIGHTS, {ENCODED_WEIGHTS}
    large = [weights, CONTROL_WEIGHTS] if expected.control else [weights]
    names = names | {*large}
    if set(manifest.files) != names:
        raise refuse(f"its files are {sorted(manifest.files)}; only {' and '.join(sorted(names))} may be sent.")
    infos = _largest(expected.architecture, package.kept_layers, expected.lora, codec)
    bound = file_bytes(infos)
    sizes = [manifest.files[name].size for name in large]
    # Another writer's header may be longer than ours.
    if max(sizes) > bound + MAX_SMALL_BYTES or manifest.total_bytes - sum(sizes) > MAX_SMALL_BYTES:
        raise refuse(
            f"its files have {manifest.total_bytes} bytes; this adapter in {_spell(codec)} needs at most "
            f"{bound * len(large)}."
        )
    try:
        verify_files(directory, manifest, beside=SIGNATURE_NAME)
        _check_header(directory / weights, header_bytes(infos) + MAX_SMALL_BYTES)
        if not expected.wire:
            _check_plain(directory / weights, expected)
        reader = open_update(directory, expected)
        _check_values(reader, expected.frozen)
        if expected.control:
            _check_header(directory / CONTROL_WEIGHTS, header_bytes(infos) + MAX_SMALL_BYTES)
            _check_plain(directory / CONTROL_WEIGHTS, expected)
            _check_values(AdapterReader(directory, CONTROL_WEIGHTS), whose="control variate's ")
    except (ArtifactError, OSError) as error:
        raise refuse(str(error)) from error
    return manifest


def _check_masked(directory: Path, manifest: UpdateManifest, words: int | None) -> None:
    """All that can be said of numbers that look like noise: that they are as many as they should be."""
    if manifest.roster is None or words is None:
        raise ArtifactError(f"its update is {'not ' if words else ''}masked; this round takes others.")
    if manifest.examples or manifest.tokens or manifest.loss_before is not None or manifest.loss_after is not None:
        raise ArtifactError("it says examples, tokens or losses; expected none in a masked update.")
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    if sizes != {MASKED_WORDS: words * WORD_BYTES}:
        raise ArtifactError(f"its files are {sizes!s:.200}; expected {MASKED_WORDS} of {words * WORD_BYTES} bytes.")
    verify_files(directory, manifest, beside=SIGNATURE_NAME)


def _check_values(reader: AdapterReader | EncodedReader, frozen: Frozen | None = None, whose: str = "") -> None:
    """That all factors are finite, none so large that a sum of them may not be, and frozen ones as they were."""
    for module in reader.modules:
        factors = dict(zip("AB", reader.read(module), strict=True))
        for letter, factor in factors.items():
            norm = torch.linalg.vector_norm(factor, dtype=torch.float64).item()
            if not math.isfinite(norm):
                raise ArtifactError(f"its {whose}{letter} of {module} holds NaN or infinity.")
            if norm > MAX_NORM:
                raise ArtifactError(
                    f"its {whose}{letter} of {module} has the norm {norm:.3g}; expected at most {MAX_NORM:g}."
                )
        if frozen:
            letter, before = frozen
            if not torch.equal(factors[letter], before.read(module)["AB".index(letter)]):
                raise ArtifactError(
                    f"its {letter} of {module} is not its adapter's; this round freezes every {letter}."
                )


def update_bytes(architecture: Architecture, layers: list[int], lora: LoraSettings, codec: Codec) -> int:
    """Bytes of an update's tensors in which every factor changed, known before anything is trained.

    One in which some did not is smaller. The manifest, in fp32 `adapter_config.json`, and a signature come on top.
    """
    return file_bytes(_largest(architecture, layers, lora, codec))


def _largest(architecture: Architecture, layers: list[int], lora: LoraSettings, codec: Codec) -> Infos:
    """The tensors of an update in which every factor changed."""
    shapes = expected_shapes(architecture, layers, lora)
    if codec.name == "fp32":  # in the order of `write_adapter`, which shows in the digits of the header
        plain = tensor_shapes(dict(sorted(shapes.items())))
        return {name: (torch.float32, shape) for name, shape in plain.items()}
    names = rank_first(shapes)
    return Layout(names, dict.fromkeys(names, True), codec).infos


def _check_plain(path: Path, expected: Expected) -> None:
    """The names, dtypes and shapes of an update in fp32."""
    infos = read_header(path)
    shapes = tensor_shapes(expected_shapes(expected.architecture, expected.package.kept_layers, expected.lora))
    for name in sorted(set(infos) ^ set(shapes)):
        raise ArtifactError(f"its tensor {name[:200]!r} is {'not expected' if name in infos else 'missing'}.")
    for name, info in infos.items():
        if info.shape != shapes[name] or info.dtype != torch.float32:
            raise ArtifactError(
                f"its tensor {name} is {info.dtype} {info.shape}; expected torch.float32 {shapes[name]}."
            )


def _spell(codec: Codec) -> str:
    return f"topk of {codec.topk_share:g}" if codec.name == "topk" else codec.name


def read_update(directory: Path) -> UpdateManifest:
    """An update's manifest, of which only the form was checked.

    Raises:
        ArtifactError: not an update, or the system can't read it.
    """
    if (directory / MANIFEST_NAME).is_symlink():
        raise ArtifactError(f"{directory / MANIFEST_NAME} is not a regular file.")
    try:
        return read_manifest(directory, UpdateManifest)
    except OSError as error:
        raise ArtifactError(f"{directory} can't be read ({error}); expected an update: send it again.") from error


def measured(update: Path) -> dict[str, float]:
    """What a client's process measured; nothing where its manifest can't be read, which validation will say."""
    try:
        return read_update(update).measured
    except ArtifactError:
        return {}


def outcome(update: Path) -> str:
    """A trained client in a few words."""
    try:
        manifest = read_update(update)
    except ArtifactError as error:
        return printable(str(error))
    if manifest.roster is not None:
        return "its update is masked"
    if manifest.loss_before is None or manifest.loss_after is None:
        loss = "loss not evaluated"
    else:
        loss = f"its held-out loss {manifest.loss_before:.3f} → {manifest.loss_after:.3f}"
    seconds, peak = (manifest.measured.get(name, 0) for name in ("seconds", "peak_memory_bytes"))
    return f"{loss}, {manifest.tokens} tokens, {seconds:.0f} s, peak memory {peak / 1e6:.0f} MB with mapped files"


def client_name(directory: Path) -> str:
    """Whom to name for a directory whose update was refused: the client if the manifest is readable, else its name."""
    try:
        return read_update(directory).client
    except ArtifactError:
        return directory.name


def _check_header(path: Path, limit: int) -> None:
    """What safetensors lets pass or takes long over: a huge header, thousands of tensors, a key that stands twice."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > limit:
            raise ArtifactError(f"{path.name} announces a header of {length} bytes; expected at most {limit}.")
        parse_json(file.read(length), f"The header of {path.name}")


def _short(digest: str | None) -> str:
    return f"{digest[:12]}…" if digest else "none"
