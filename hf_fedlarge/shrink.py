"""Shrink a checkpoint into a package: drop layers, store the rest in 4 bits, a few blocks of rows in memory at a time.

Which layers go is a plan that can be printed before anything is written. Layers are dropped evenly from the middle; the
first two and the last one stay as long as the count allows, because models stand their loss worst. What stands in a
dropped layer's place, and which neurons the others keep, is fitted before (`fit.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from hf_fedlarge.architectures import Architecture, describe, empty_model, load_config, shrink_config
from hf_fedlarge.artifacts import (
    PackageManifest,
    check_output,
    file_entry,
    staged_directory,
    write_json,
    write_manifest,
)
from hf_fedlarge.blocks import in_order, workers
from hf_fedlarge.cards import read_license
from hf_fedlarge.checkpoints import copy_companions, open_checkpoint
from hf_fedlarge.config import Embeddings
from hf_fedlarge.entries import BaseModelEntry, FileEntry, LayerEntry
from hf_fedlarge.errors import ArtifactError, ConfigError
from hf_fedlarge.fit import Fitted
from hf_fedlarge.layers import format_ranges, parse_layers
from hf_fedlarge.neurons import indices_name
from hf_fedlarge.quantize import BLOCK, Infos, encode_rows, encoded_infos, join_rows
from hf_fedlarge.tensors import (
    INDEX_NAME,
    CheckpointReader,
    SafetensorsWriter,
    checkpoint_digest,
    plan_shards,
    shard_names,
)

MAX_SHARD_BYTES = 2**30
FITTED_NAME = "fitted.safetensors"
CORRECTIONS_NAME = "corrections.safetensors"
_ROW_BLOCK_VALUES = 2 * 2**20


@dataclass(frozen=True)
class ShrinkPlan:
    """What shrinking will do: plain data, printed by `--dry-run`.

    Attributes:
        checkpoint: directory of the full model.
        architecture: of the full model.
        kept: global numbers of the layers that stay; the index is the package's block number.
        codecs: the package's matrices and how each is stored; parameters that are not listed stay dense vectors.
        sources: the package's parameter name → the tensor of the checkpoint it is made from.
        scores: what each layer scored, where they were chosen by scores; else none.
        scored: by what, and what that took.
        widths: layer → how many of its neurons stay; layers that are not listed keep all.
        undecided: what of layers and widths is even here, and still to be chosen on calibration text.
        full_bytes, package_bytes: weights before and after, surrogates left out.
        sequences: calibration text (`calibrate.calibration_sequences`), where it was given or read for the plan.
    """

    checkpoint: Path
    architecture: Architecture
    kept: tuple[int, ...]
    embeddings: Embeddings
    codecs: dict[str, str]
    sources: dict[str, str]
    full_bytes: int
    package_bytes: int
    scores: tuple[float, ...] = ()
    scored: str = ""
    widths: Mapping[int, int] = field(default_factory=dict)
    undecided: tuple[str, ...] = ()
    sequences: Sequence[torch.Tensor] = field(default=(), repr=False, compare=False)

    @property
    def layers(self) -> int:
        """How many layers the full model has."""
        return self.architecture.layers

    @property
    def dropped(self) -> tuple[int, ...]:
        """Global numbers of the layers that go."""
        return tuple(layer for layer in range(self.layers) if layer not in self.kept)

    def describe(self) -> str:
        """The plan as a few lines of text."""
        having: dict[int, list[int]] = {}
        for layer in self.kept:
            having.setdefault(self.widths.get(layer, self.architecture.neuron_count), []).append(layer)
        neurons = (f"layer {format_ranges(having[width])}: {width}" for width in sorted(having, reverse=True))
        count = Counter(self.codecs.values())
        about, even = "about " if "widths" in self.undecided else "", " and ".join(self.undecided)
        return (
            f"{self.checkpoint}: keep {len(self.kept)} of {self.layers} layers\n"
            f"  kept     {format_ranges(self.kept)}\n"
            f"  dropped  {format_ranges(self.dropped)}\n"
            + (f"  neurons  {'; '.join(neurons)}\n" if self.widths else "")
            + f"  storage  {len(self.codecs)} matrices: "
            + ", ".join(f"{count[codec]} {codec}" for codec in ("nf4", "int8", "dense") if codec in count)
            + (f"\n  scores   {self.scored}" if self.scores else "")
            + "".join(f"\n  layer {layer:3} scores {score:.4f}" for layer, score in enumerate(self.scores))
            + f"\n  weights  {self.full_bytes / 1e6:.1f} MB → {about}{self.package_bytes / 1e6:.1f} MB"
            f" ({self.package_bytes / self.full_bytes:.1%})"
            + (f"\n  open     {even}, even here: the calibration text decides when the package is made" if even else "")
        )


def choose_layers(total: int, count: int) -> list[int]:
    """`count` of `total` layers: the dropped ones spread evenly, sparing the first two and the last while possible."""
    spared = {0, 1, total - 1}
    middle = [layer for layer in range(total) if layer not in spared]
    drop = total - count
    if drop > len(middle):
        # Too few are kept to spare any: spread the kept ones over the depth instead.
        return sorted({round(index * (total - 1) / max(1, count - 1)) for index in range(count)})
    dropped = {middle[int((index + 0.5) * len(middle) / drop)] for index in range(drop)}
    return [layer for layer in range(total) if layer not in dropped]


def plan_shrink(
    checkpoint: Path,
    *,
    keep_layers: str | float | list[int] = 0.75,
    keep_neurons: float | Mapping[int, int] = 1.0,
    embeddings: Embeddings = "int8",
) -> ShrinkPlan:
    """Decide which layers stay and how each weight is stored, from the checkpoint's configuration and headers.

    Args:
        checkpoint: a directory with a configuration and safetensors.
        keep_layers: a count, a fraction, or layer numbers (`config.parse_layers`).
        keep_neurons: the share of its neurons that each kept layer's feed-forward layer keeps, below 1 to a multiple of
            64; or layer → how many it keeps, for all that are kept.
        embeddings: how the token embedding and the head are stored.

    Raises:
        ArtifactError: not a whole checkpoint.
        ArchitectureError: a model that can't be shrunk.
        ConfigError: `keep_layers`, `keep_neurons` or `embeddings` is out of range, or the family has feed-forward
            layers whose neurons can't be told apart.
    """
    if embeddings not in ("int8", "nf4", "bf16"):
        raise ConfigError(f"--embeddings {embeddings} is not known; expected int8, nf4 or bf16.")
    base = open_checkpoint(checkpoint)
    full, reader, stored = base.architecture, base.reader, base.names
    wanted = parse_layers(keep_layers, full.layers)
    kept = wanted if isinstance(wanted, list) else choose_layers(full.layers, wanted)
    widths = keep_neurons if isinstance(keep_neurons, Mapping) else dict.fromkeys(kept, _width(full, keep_neurons))
    assert set(widths) == set(kept), "widths of other layers"
    widths = {layer: count for layer, count in widths.items() if count < full.neuron_count}
    small = describe(shrink_config(base.config, kept))
    small = replace(small, neurons={kept.index(layer): torch.arange(count) for layer, count in widths.items()})

    sources, codecs, package_bytes = {}, {}, 0
    matrices = {name for block in range(small.layers) for name in small.linear_weights(block)}
    ends = {f"{small.embedding}.weight", f"{small.head}.weight"}
    for name, shape in small.parameters.items():
        block = small.layer_of(name)
        sources[name] = stored[name if block is None else full.in_layer(name, kept[block])]
        if name in matrices:
            codecs[name] = "nf4"
        elif name in ends:
            codecs[name] = "dense" if embeddings == "bf16" else embeddings
        info = reader.infos[sources[name]]
        if info.shape != shape or not info.dtype.is_floating_point:
            raise ArtifactError(
                f"{checkpoint} holds {info.name} as {info.dtype} {info.shape}; its config asks for floats {shape}."
            )
        package_bytes += _bytes(_infos(small, name, codecs.get(name)))
    return ShrinkPlan(
        checkpoint=checkpoint,
        architecture=full,
        kept=tuple(kept),
        embeddings=embeddings,
        codecs=codecs,
        sources=sources,
        full_bytes=sum(info.nbytes for info in reader.infos.values()),
        package_bytes=package_bytes,
        widths=widths,
    )


def _width(architecture: Architecture, share: float) -> int:
    """How many neurons a layer keeps of those it has."""
    if not 0 < share <= 1:
        raise ConfigError(f"--keep-neurons {share} is out of range; expected a share above 0 and up to 1.")
    if share < 1 and architecture.feed_forward is None:
        raise ConfigError(
            f"The feed-forward layers of {architecture.model_type} can't lose neurons, as they aren't recognized (gate "
            "and up may be one matrix); use --keep-neurons 1 and fewer layers."
        )
    if share == 1:  # which need be no multiple of 64
        return architecture.neuron_count
    return min(architecture.neuron_count, max(BLOCK, round(share * architecture.neuron_count / BLOCK) * BLOCK))


def shrink(
    plan: ShrinkPlan,
    output: Path,
    *,
    base_id: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    fitted: Fitted | None = None,
    stock: bool = True,
) -> PackageManifest:
    """Write the package that `plan` describes.

    Args:
        plan: from `plan_shrink`.
        output: the directory to make.
        base_id: what the manifest calls the base model; None: the checkpoint directory's name.
        revision: its revision on the Hub, if it came from there.
        overwrite: replace a package that is there already.
        progress: called with the bytes that are written, of `ShrinkPlan.package_bytes`.
        fitted: from `fit.fit`, for a plan by which neurons go or surrogates are wanted.
        stock: whether stock transformers may load it, if it can; not where corrections will be added.

    Raises:
        OutputError: `output` exists or can't be written.
    """
    check_output(output, overwrite)
    config = load_config(plan.checkpoint)
    config.tie_word_embeddings = plan.architecture.tied
    fitted = fitted or Fitted()
    assert set(plan.widths) == set(fitted.neurons), "the fit is of another plan"
    small_config = shrink_config(config, list(plan.kept))
    block_of = {layer: block for block, layer in enumerate(plan.kept)}
    small = describe(small_config)
    small = replace(small, neurons={block_of[layer]: kept for layer, kept in fitted.neurons.items()})
    reader = CheckpointReader(plan.checkpoint)
    infos = {name: _infos(small, name, plan.codecs.get(name)) for name in small.parameters}
    shards = plan_shards({name: _bytes(parts) for name, parts in infos.items()}, MAX_SHARD_BYTES)
    places = {name: _places(small, name) for name in small.parameters}

    def encoded_rows(place: tuple[str, int, int]) -> dict[str, torch.Tensor]:
        name, start, stop = place
        rows = _rows(plan, small, reader, fitted, name, start, stop)
        return encode_rows(name, plan.codecs.get(name, "dense"), rows)

    with staged_directory(output, overwrite=overwrite) as staging, workers() as pool:
        base_digest = pool.submit(checkpoint_digest, plan.checkpoint)
        blocks = in_order(pool, encoded_rows, [place for names in shards for name in names for place in places[name]])
        files, weight_map, done = {}, {}, 0
        for file, names in zip(shard_names(len(shards)), shards, strict=True):
            parts = {part: info for name in names for part, info in infos[name].items()}
            # Wider types first, so that every tensor is aligned to its type when the file is mapped.
            ordered = dict(sorted(parts.items(), key=lambda item: -item[1][0].itemsize))
            with SafetensorsWriter(staging / file, ordered) as writer:
                for name in names:
                    shape, codec = _stored_shape(small, name), plan.codecs.get(name, "dense")
                    for part, rows in join_rows(name, shape, codec, islice(blocks, len(places[name]))):
                        writer.write(part, rows)
                    done += _bytes(infos[name])
                    if progress:
                        progress(done)
                files[file] = writer.close()
            weight_map |= dict.fromkeys(parts, file)
        if len(shards) > 1:
            total = sum(_bytes(parts) for parts in infos.values())
            write_json(staging / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        extras = fitted.tensors | {indices_name(layer): kept.to(torch.int32) for layer, kept in fitted.neurons.items()}
        if extras:
            files[FITTED_NAME] = write_tensors(staging / FITTED_NAME, extras)
        _write_config(staging, small_config, small, plan, stock=stock and plan.embeddings == "bf16" and not extras)
        copy_companions(plan.checkpoint, staging)
        license_name, license_link = read_license(plan.checkpoint)
        manifest = PackageManifest(
            files=files | {path.name: file_entry(path) for path in sorted(staging.iterdir()) if path.name not in files},
            base=BaseModelEntry(
                id=base_id or plan.checkpoint.resolve().name,
                revision=revision,
                digest=base_digest.result(),
                license=license_name,
                license_link=license_link,
            ),
            model_type=small.model_type,
            layers=[
                LayerEntry(layer=layer, block=block_of.get(layer), neurons=plan.widths.get(layer))
                for layer in range(plan.layers)
            ],
            embeddings=plan.embeddings,
            codecs=plan.codecs,
            surrogates=fitted.surrogates,
        )
        write_manifest(staging, manifest)
    return manifest


def _infos(architecture: Architecture, name: str, codec: str | None) -> Infos:
    """The tensors that the parameter `name` becomes; a vector, which has no codec, is stored in bf16."""
    if codec is None:
        return {name: (torch.bfloat16, architecture.shape_of(name))}
    return encoded_infos(name, _stored_shape(architecture, name), codec)


def _stored_shape(architecture: Architecture, name: str) -> tuple[int, ...]:
    """(out, in) also where the model's layer has it the other way round: bitsandbytes stores it so."""
    shape = architecture.shape_of(name)
    return shape[::-1] if architecture.is_transposed(name) else shape


def _places(architecture: Architecture, name: str) -> list[tuple[str, int, int]]:
    """(name, start, stop): the blocks of rows, as they are stored in the package, that a parameter is encoded in."""
    rows, *columns = _stored_shape(architecture, name) or (1,)
    # Multiples of 64 rows are whole quantization blocks, whatever the width.
    step = max(1, _ROW_BLOCK_VALUES // math.prod(columns) // BLOCK) * BLOCK
    return [(name, start, min(start + step, rows)) for start in range(0, rows, step)]


def _rows(
    plan: ShrinkPlan,
    architecture: Architecture,
    reader: CheckpointReader,
    fitted: Fitted,
    name: str,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Some rows of a parameter as they are stored in the package, but not encoded yet."""
    source, module = plan.sources[name], name.rpartition(".")[0]
    block = architecture.layer_of(name)
    if block is not None and (full_name := architecture.in_layer(name, plan.kept[block])) in fitted.matrices:
        return fitted.matrices[full_name][start:stop]
    if (kept := architecture.neurons_out(module)) is not None:
        whole = reader.read(source)
        return (whole.T if architecture.is_transposed(name) else whole)[kept[start:stop]]
    if architecture.is_transposed(name):
        return reader.read(source).T[start:stop]
    return reader.read_rows(source, start, stop)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> FileEntry:
    """Write tensors to one file; its size and digest."""
    # Wider types first, so that every tensor is aligned to its type when the file is mapped.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    with SafetensorsWriter(
        path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}
    ) as file:
        for name, tensor in ordered.items():
            file.write(name, tensor)
        return file.close()


def _bytes(infos: Infos) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in infos.values())


def _write_config(
    staging: Path, config: PretrainedConfig, architecture: Architecture, plan: ShrinkPlan, stock: bool
) -> None:
    """The small model's configuration. Stock transformers loads it where all it needs is bitsandbytes' NF4."""
    config.dtype = torch.bfloat16
    values = config.to_diff_dict() | {"architectures": config.architectures, "dtype": "bfloat16"}
    if stock:
        inside = {
            f"{architecture.blocks}.{block}.{path}"
            for block in range(architecture.layers)
            for path in architecture.linears
        }
        modules = empty_model(config, torch.bfloat16).named_modules()
        outside = [path for path, module in modules if isinstance(module, nn.Linear) and path not in inside]
        values["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=outside,
        ).to_dict()
    else:
        # A method that stock loaders don't know makes them refuse; they would take the integers for weights.
        values["quantization_config"] = {"quant_method": "hf_fedlarge", "embeddings": plan.embeddings}
    write_json(staging / "config.json", values)
