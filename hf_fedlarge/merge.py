"""Folding an adapter into the full-depth, full-precision checkpoint, a few megabytes at a time.

The output has the base's shards: the same files, tensors, order, dtypes and index, every matrix under an adapter
replaced by W + scale · B A and all other tensors copied. Of the files beside them come along those that a model needs
(`untrusted.COMPANIONS`): not custom code, which the config no longer names. A merged value is the fp64 result rounded
once to the checkpoint's dtype, so nothing is lost that the dtype could hold. `peft` and `transformers` would need the
whole model in memory; here it is one block of rows, besides the adapter.

A merge that was killed goes on where it stopped: a finished shard is renamed into the staging directory and recorded
there, and the same merge run again takes it over after checking its digest.

Left out: adapters on embeddings, heads and norms (LoRA here targets the blocks' matrices only), and other formats than
safetensors. Two merges into one output at the same time are not kept apart.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from hf_fedlarge.adapters import ADAPTER_WEIGHTS, expected_shapes, read_state, tensor_shapes
from hf_fedlarge.architectures import Architecture
from hf_fedlarge.artifacts import (
    CARRY_WEIGHTS,
    UNPUBLISHED_FILES,
    AdapterManifest,
    CheckpointManifest,
    check_output,
    file_entry,
    read_manifest,
    staged_directory,
    verify_files,
    write_json,
    write_manifest,
)
from hf_fedlarge.blocks import ROUNDED_DTYPES, add_product, in_order, workers
from hf_fedlarge.checkpoints import open_checkpoint
from hf_fedlarge.config import LoraSettings, Record
from hf_fedlarge.entries import BaseModelEntry, Digest, FileEntry, FileName, is_file_name
from hf_fedlarge.errors import ArtifactError, OutputError
from hf_fedlarge.tensors import (
    INDEX_NAME,
    CheckpointReader,
    Factors,
    SafetensorsWriter,
    TensorInfo,
    checkpoint_digest,
    read_header,
)
from hf_fedlarge.untrusted import is_companion

STATE_NAME = ".merge.json"  # no copied file can be called so: their names start with a letter or a digit

_BLOCK_BYTES = 4 * 2**20  # as stored; a few blocks for each thread exist at once


@dataclass(frozen=True)
class MergeTarget:
    """One matrix that changes.

    Attributes:
        name: the tensor's name in the checkpoint.
        module: the module's path in the transformers model, which is also its name in the adapter.
        layer: the block it lies in.
        transposed: stored as (in, out), so (B A)^T is added to it.
        dtype: the dtype it has and keeps.
    """

    name: str
    module: str
    layer: int
    transposed: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do, after everything was checked.

    Attributes:
        checkpoint: the base's directory.
        adapter: the adapter's directory.
        base: the base as the adapter's manifest names it; its digest is that of `checkpoint`.
        adapter_digest: the digest of the adapter's manifest.
        lora: the adapter's settings; its carry, if there is one, counts as often.
        targets: the matrices that change, in the order of the model.
        shards: the files that are rewritten.
        nbytes: bytes of all tensors in them.
        copied: the files that are copied as they are.
        left_out: the files that are not, and the folders: no model needs them, or not with its weights merged.
    """

    checkpoint: Path
    adapter: Path
    base: BaseModelEntry
    adapter_digest: str
    lora: LoraSettings
    targets: tuple[MergeTarget, ...]
    shards: tuple[str, ...]
    nbytes: int
    copied: tuple[str, ...]
    left_out: tuple[str, ...]

    def describe(self) -> str:
        """The plan for `--dry-run`, a few lines."""
        layers = {target.layer for target in self.targets}
        dtypes = sorted({str(target.dtype).removeprefix("torch.") for target in self.targets})
        lines = [
            f"merge {self.adapter} ({self.adapter_digest[:12]})",
            f"into  {self.checkpoint} ({self.base.id}, {self.base.digest[:12]})",
            f"change {len(self.targets)} matrices in {len(layers)} layers ({', '.join(dtypes)}), "
            f"scale {self.lora.scale:g}",
            f"rewrite {self.nbytes / 1e6:,.1f} MB in {', '.join(self.shards)}",
            f"copy {', '.join(self.copied) or 'no other file'}",
            f"leave out {', '.join(self.left_out) or 'nothing'}",
        ]
        return "\n".join(lines)


class _State(Record):
    """What a merge that was stopped has finished, and which merge it was."""

    base: Digest
    adapter: Digest
    shards: dict[FileName, FileEntry] = {}


def plan_merge(checkpoint: Path, adapter: Path) -> MergePlan:
    """Check that `adapter` belongs to and fits `checkpoint`, and say what merging them will do. Writes nothing.

    Reads the whole checkpoint once for its digest, unless that is known (`digests.py`).

    Args:
        checkpoint: a safetensors checkpoint of a decoder-only model.
        adapter: an adapter directory with its manifest.

    Raises:
        ArtifactError: one of the two is damaged or of another kind, the adapter was trained on another base, or it
            has a module that is no matrix of the model's blocks, or of another shape.
        ArchitectureError: the model is of a kind that can't be merged.
    """
    manifest = read_manifest(adapter, AdapterManifest)
    verify_files(adapter, manifest, published=True, unneeded=UNPUBLISHED_FILES)
    base = open_checkpoint(checkpoint)
    architecture, reader, names = base.architecture, base.reader, base.names
    found = checkpoint_digest(checkpoint)
    if found != manifest.base.digest:
        raise ArtifactError(
            f"{checkpoint} has the digest {found[:12]}…, but {adapter} was trained on {manifest.base.id} with the "
            f"digest {manifest.base.digest[:12]}…; merge it into that one."
        )

    stored = {name: info.shape for name, info in read_header(adapter / ADAPTER_WEIGHTS).items()}
    targets = []
    lora = manifest.lora.model_copy(update={"targets": None})
    expected = expected_shapes(architecture, list(range(architecture.layers)), lora)
    if CARRY_WEIGHTS in manifest.files:
        check_carry(adapter, tensor_shapes(expected).keys() & stored.keys(), stored)
    for module, shapes in expected.items():
        wanted = tensor_shapes({module: shapes})
        factors = {name: stored.pop(name) for name in wanted if name in stored}
        if factors and factors != wanted:
            raise ArtifactError(
                f"{adapter} holds {factors} for the matrix {module} of {checkpoint}; expected {wanted}."
            )
        if factors:
            targets.append(_target(architecture, module, reader.infos[names[f"{module}.weight"]], checkpoint))
    for name in stored:
        raise ArtifactError(
            f"{adapter} holds {name}, which belongs to no matrix in the {architecture.layers} blocks of the "
            f"{architecture.model_type} model in {checkpoint}."
        )
    for shard in reader.files:
        if not is_file_name(shard):
            raise ArtifactError(
                f"{checkpoint} has a shard called {shard!r}; expected letters, digits, '.', '_' and '-'."
            )
    copied, left_out = _other_files(checkpoint, reader)
    return MergePlan(
        checkpoint=checkpoint,
        adapter=adapter,
        base=manifest.base,
        adapter_digest=manifest.digest,
        lora=manifest.lora,
        targets=tuple(targets),
        shards=tuple(reader.files),
        nbytes=sum(info.nbytes for info in reader.infos.values()),
        copied=copied,
        left_out=left_out,
    )


def merge(
    checkpoint: Path,
    adapter: Path,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> CheckpointManifest:
    """Write `checkpoint` with `adapter` folded in to `output`; run again after an interruption, it goes on.

    Peak memory is the adapter's factors and some tens of megabytes, whatever the size of the model.

    Args:
        checkpoint: the base the adapter was trained on.
        adapter: an adapter directory with its manifest.
        output: the directory to make.
        overwrite: replace an artifact of ours that is there already.
        progress: called with the bytes of tensors that are done, of `MergePlan.nbytes`, after each block of rows.

    Returns:
        The output's manifest, which is written there as `fedlarge.json`.

    Raises:
        ArtifactError: as `plan_merge`, or a merged value is beyond its dtype; the message names the tensor.
        ArchitectureError: as `plan_merge`.
        OutputError: `output` exists, is one of the inputs, or can't be written.
    """
    check_output(output, overwrite)
    if output.resolve() in (checkpoint.resolve(), adapter.resolve()):
        raise OutputError(f"{output} is what would be merged; choose another output.")
    plan = plan_merge(checkpoint, adapter)
    reader = CheckpointReader(checkpoint)
    whole, factors = read_state(adapter, plan.lora)
    targets = {target.name: target for target in plan.targets}
    done = 0

    def merged_rows(place: tuple[str, int, int]) -> torch.Tensor:
        name, start, _ = place
        rows = reader.read_rows(*place)
        if name not in targets:
            return rows
        return _merged(targets[name], factors[targets[name].module], whole.scale, rows, start)

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done)

    with staged_directory(output, overwrite=overwrite, resume=True) as staging, workers() as pool:
        shards = _take_over(staging, plan)
        for shard in plan.shards:
            if shard in shards:
                advance(sum(info.nbytes for info in reader.infos.values() if info.file == shard))
                continue
            shards[shard] = _write_shard(pool, reader, shard, staging / shard, merged_rows, advance)
            _save_state(staging, plan, shards)
        for name in plan.copied:
            shutil.copyfile(checkpoint / name, staging / name)
        _name_no_code(staging / "config.json")
        files = shards | {name: file_entry(staging / name) for name in plan.copied}
        manifest = CheckpointManifest(
            files=dict(sorted(files.items())),
            base=plan.base,
            adapter=plan.adapter_digest,
            merged=[target.module for target in plan.targets],
        )
        write_manifest(staging, manifest)
        (staging / STATE_NAME).unlink()
    return manifest


def check_carry(adapter: Path, names: Set[str], stored: dict[str, tuple[int, ...]]) -> None:
    """A carry has factors for some of the adapter's modules, alike but for their rank.

    Args:
        adapter: the directory, with a carry.
        names: tensors that the carry may continue.
        stored: name → shape of the adapter's tensors.

    Raises:
        ArtifactError: it has others.
    """
    carried = read_header(adapter / CARRY_WEIGHTS)
    for name, info in carried.items():
        side = 1 if name.endswith(".lora_A.weight") else 0
        partner = carried.get(name.replace(*(".lora_A.", ".lora_B.") if side else (".lora_B.", ".lora_A.")))
        fits = name in names and len(info.shape) == 2 and info.shape[side] == stored[name][side]
        if not fits or partner is None or partner.shape[side] != info.shape[1 - side]:
            raise ArtifactError(
                f"{adapter / CARRY_WEIGHTS} holds {name} of shape {info.shape}, which doesn't continue the adapter's "
                f"{stored.get(name)}; fetch the adapter again."
            )


def _target(architecture: Architecture, module: str, info: TensorInfo, checkpoint: Path) -> MergeTarget:
    """The target for one matrix, whose stored tensor must be what the model's configuration says."""
    expected = architecture.parameters[f"{module}.weight"]
    if info.shape != expected or info.dtype not in ROUNDED_DTYPES:
        raise ArtifactError(
            f"{checkpoint} holds {info.name} as {info.dtype} of shape {info.shape}; expected {expected} in float32, "
            f"float16 or bfloat16."
        )
    layer = architecture.layer_of(f"{module}.")
    linear = module.removeprefix(f"{architecture.blocks}.{layer}.")
    return MergeTarget(info.name, module, layer, linear in architecture.transposed, info.dtype)


def _other_files(checkpoint: Path, reader: CheckpointReader) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the files to copy, and of those to leave out, all folders among them."""
    wanted = {"config.json"} | ({INDEX_NAME} if reader.index is not None else set())
    copied, left_out = [], []
    for path in sorted(checkpoint.iterdir()):
        name = path.name
        if path.is_dir():
            left_out.append(f"{name}/")
        if not path.is_file() or name in reader.files:
            continue
        needed = name in wanted or is_companion(name)
        (copied if needed and is_file_name(name) else left_out).append(name)
    return tuple(copied), tuple(left_out)


def _name_no_code(path: Path) -> None:
    """Take from a configuration the custom code that it names; transformers may look for it."""
    config = json.loads(path.read_bytes())
    if config.pop("auto_map", None) is not None:
        write_json(path, config)


def _write_shard(
    pool: ThreadPoolExecutor,
    reader: CheckpointReader,
    shard: str,
    path: Path,
    merged_rows: Callable[[tuple[str, int, int]], torch.Tensor],
    advance: Callable[[int], None],
) -> FileEntry:
    """Write one shard, its targets merged, under a temporary name, flush it and rename it to `path`."""
    infos = {name: info for name, info in reader.infos.items() if info.file == shard}
    places = [(name, *rows) for name in infos for rows in reader.row_ranges(name, _BLOCK_BYTES)]
    partial = path.with_name(f".{shard}.partial")
    layout = {name: (info.dtype, info.shape) for name, info in infos.items()}
    with SafetensorsWriter(partial, layout, reader.metadata(shard)) as writer:
        for (name, *_), rows in zip(places, in_order(pool, merged_rows, places), strict=True):
            writer.write(name, rows)
            advance(rows.nbytes)
        entry = writer.close()
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    return entry


def _merged(target: MergeTarget, factors: Factors, scale: float, rows: torch.Tensor, start: int) -> torch.Tensor:
    """The rows of a target that begin at `start`, as stored, merged, in their dtype."""
    A_RI, B_OR = factors
    left, right = (A_RI.T, B_OR.T) if target.transposed else (B_OR, A_RI)
    merged, finite = add_product(rows, left[start : start + len(rows)], right, scale)
    if not finite:
        raise ArtifactError(
            f"Merging {target.module} gives a value in {target.name} that {target.dtype} can't hold; "
            f"the adapter or the checkpoint is damaged, or the dtype is too narrow."
        )
    return merged


def _take_over(staging: Path, plan: MergePlan) -> dict[str, FileEntry]:
    """The shards that an earlier run of the same merge finished; whatever else lies in `staging` is removed."""
    try:
        state = _State.model_validate_json((staging / STATE_NAME).read_bytes())
    except (FileNotFoundError, ValidationError):
        state = _State(base=plan.base.digest, adapter=plan.adapter_digest)
    shards = {}
    if (state.base, state.adapter) == (plan.base.digest, plan.adapter_digest):
        for name, entry in state.shards.items():
            if name in plan.shards and (staging / name).is_file() and file_entry(staging / name) == entry:
                shards[name] = entry
    # Recorded before anything is removed: killed in between, the next run must not trust what is being removed.
    _save_state(staging, plan, shards)
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in shards and path.name != STATE_NAME:
            path.unlink()
    return shards


def _save_state(staging: Path, plan: MergePlan, shards: dict[str, FileEntry]) -> None:
    state = _State(base=plan.base.digest, adapter=plan.adapter_digest, shards=shards)
    write_json(staging / STATE_NAME, state.model_dump(mode="json"))
