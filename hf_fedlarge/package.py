"""Load a package, or a full checkpoint, as a Hugging Face model whose frozen weights stay memory-mapped as stored.

And save the adapter that was trained on a package as one of the full model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_fedlarge.adapters import adapter_parameters, get_factors, write_adapter
from hf_fedlarge.architectures import Architecture, describe, empty_model, load_config, logit_transform
from hf_fedlarge.artifacts import PackageManifest, read_manifest, verify_files
from hf_fedlarge.checkpoints import open_checkpoint
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.corrections import corrected, is_correctable
from hf_fedlarge.entries import HealedEntry
from hf_fedlarge.errors import ArtifactError, ConfigError
from hf_fedlarge.layers import format_ranges
from hf_fedlarge.loss import StreamedHead
from hf_fedlarge.memory import forget_pages
from hf_fedlarge.neurons import indices_name
from hf_fedlarge.quantize import FrozenWeight, decode
from hf_fedlarge.rounding import RoundedWeight
from hf_fedlarge.streaming import attach
from hf_fedlarge.surrogate import bias_name, second_name, weight_name
from hf_fedlarge.templates import check_length


class MappedTensors:
    """The tensors of a directory's safetensors files by name, memory-mapped for as long as they are referenced.

    Args:
        directory: where the files are.
        files: their names.
        stored: parameter name → the name it is stored under, where they differ.
    """

    def __init__(self, directory: Path, files: list[str], stored: dict[str, str] | None = None) -> None:
        self._handles = {}
        for file in files:
            handle = safe_open(directory / file, framework="pt")
            self._handles |= dict.fromkeys(handle.keys(), handle)
        self._stored = stored or {}

    def __getitem__(self, name: str) -> torch.Tensor:
        name = self._stored.get(name, name)
        return self._handles[name].get_tensor(name)

    def __contains__(self, name: str) -> bool:
        return self._stored.get(name, name) in self._handles

    def forget(self) -> None:
        """Take the pages that were read from this process, which nobody may have written to."""
        forget_pages(handle.get_tensor(name) for name, handle in self._handles.items())


def load_package(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    micro_batch_size: int | None = None,
    verify: bool = True,
) -> PreTrainedModel:
    """A causal language model that streams its blocks from `directory` (see `hf_fedlarge.streaming`).

    Args:
        directory: a package made by `shrink`.
        dtype: of the computation; dequantized weights have it too.
        device: where to compute; the compressed weights stay in mapped host memory.
        micro_batch_size: sequences computed at a time inside a block while training; None: the whole batch.
        verify: check every file's size and SHA-256 first.

    Returns:
        A frozen model in eval mode; `model.engine` is its `StreamingEngine`, `model.package` its manifest. Called
        with `labels` it returns the loss and no logits.

    Raises:
        ArtifactError: not a package, or damaged.
        ArchitectureError: a family that can't be streamed.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, PackageManifest)
    if verify:
        verify_files(directory, manifest, published=True)
    tensors = _mapped(directory, manifest)
    config = package_config(directory)
    architecture = package_architecture(directory, manifest)
    surrogates = _surrogates(manifest, tensors, config.hidden_size, dtype, torch.device(device))
    model = _assemble(
        directory,
        config,
        architecture,
        tensors,
        manifest.codecs,
        dtype,
        device,
        micro_batch_size,
        surrogates,
        healed=manifest.healed,
    )
    model.package = manifest
    return model


def package_architecture(directory: Path, manifest: PackageManifest) -> Architecture:
    """The architecture of a package, with the neurons that its blocks have.

    Raises:
        ArtifactError: the package lacks their numbers.
    """
    architecture = describe(package_config(directory))
    return replace(architecture, neurons=_neurons(manifest, architecture, _mapped(directory, manifest)))


def _mapped(directory: Path, manifest: PackageManifest) -> MappedTensors:
    return MappedTensors(directory, [name for name in manifest.files if name.endswith(".safetensors")])


def _surrogates(
    manifest: PackageManifest,
    tensors: MappedTensors,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[int, tuple[list[FrozenWeight], torch.Tensor]]:
    """Block → the matrices and b of the surrogate behind it."""
    block_of = {layer: block for block, layer in enumerate(manifest.kept_layers)}
    found = {}
    for entry in manifest.surrogates:
        first = entry.layers[0]
        if first - 1 not in block_of or set(entry.layers) & set(block_of):
            raise ArtifactError(
                f"The package has a surrogate for the layers {format_ranges(entry.layers)}, which do not stand right "
                f"behind a kept one and were not all dropped; make it again."
            )
        bias = tensors[bias_name(first)] if bias_name(first) in tensors else torch.empty(0)
        if bias.shape != (width,) or not bias.is_floating_point():
            raise ArtifactError(f"The package lacks {bias_name(first)} of {width} floats; make or fetch it again.")
        shapes = {weight_name(first): (entry.rank or width, width)}
        if entry.rank:
            shapes[second_name(first)] = (width, entry.rank)
        weights = [decode(name, entry.codec, tensors, shape=shape) for name, shape in shapes.items()]
        found[block_of[first - 1]] = weights, bias.to(device, dtype)
    return found


def _neurons(manifest: PackageManifest, architecture: Architecture, tensors: MappedTensors) -> dict[int, torch.Tensor]:
    """Block → numbers of the neurons it has, for the blocks that lost some."""
    found = {}
    for entry in manifest.layers:
        if entry.block is None or entry.neurons is None:
            continue
        name = indices_name(entry.layer)
        kept = tensors[name] if name in tensors else torch.empty(0)
        if (
            kept.shape != (entry.neurons,)
            or kept.dtype != torch.int32
            or not (kept.diff() > 0).all()
            or not 0 <= kept[0] <= kept[-1] < architecture.neuron_count
        ):
            raise ArtifactError(
                f"The package lacks {name}, increasing numbers of {entry.neurons} of {architecture.neuron_count} "
                "neurons; make or fetch it again."
            )
        found[entry.block] = kept.long()
    return found


def stream_checkpoint(
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    stored_as: Mapping[str, str] | None = None,
) -> PreTrainedModel:
    """A full checkpoint as a model that streams its blocks, so that a model larger than memory can be evaluated.

    Args:
        directory: a checkpoint with safetensors.
        dtype: of the computation, whatever the checkpoint's own: a package computes in bf16, too, and fp16 is too
            narrow for many a model's states.
        device: where to compute.
        stored_as: matrix → the codec of a package in which its values shall seem to have been stored.

    Raises:
        ArtifactError: not a whole checkpoint.
        ArchitectureError: a family that can't be streamed.
    """
    checkpoint = open_checkpoint(directory)
    config, architecture = checkpoint.config, checkpoint.architecture
    tensors = MappedTensors(directory, checkpoint.reader.files, checkpoint.names)
    ends = {f"{architecture.embedding}.weight", f"{architecture.head}.weight"}
    matrices = {name for layer in range(architecture.layers) for name in architecture.linear_weights(layer)}
    codecs = dict.fromkeys(matrices | (ends & set(architecture.parameters)), "dense")
    return _assemble(directory, config, architecture, tensors, codecs, dtype, device, stored_as=stored_as)


def _assemble(
    directory: Path,
    config: PretrainedConfig,
    architecture: Architecture,
    tensors: MappedTensors,
    codecs: dict[str, str],
    dtype: torch.dtype,
    device: str | torch.device,
    micro_batch_size: int | None = None,
    surrogates: dict[int, tuple[list[FrozenWeight], torch.Tensor]] | None = None,
    stored_as: Mapping[str, str] | None = None,
    healed: HealedEntry | None = None,
) -> PreTrainedModel:
    """An empty model with its vectors filled in, whose matrices stream from `tensors`."""
    device = torch.device(device)
    model = empty_model(config, dtype)
    _narrow(model, architecture)
    weights: dict[str, FrozenWeight] = {}
    for name in architecture.parameters:
        shape = architecture.shape_of(name)
        if name not in tensors:
            raise ArtifactError(f"{directory} lacks the tensor {name}; make or fetch it again.")
        codec = codecs.get(name)
        if codec is None:
            _set_parameter(model, name, tensors[name].to(device, dtype))
            continue
        # A checkpoint keeps GPT-2's matrices as the model has them, a package as bitsandbytes wants them.
        turned = architecture.is_transposed(name) and codec != "dense"
        weights[name] = decode(name, codec, tensors, shape=(shape[1], shape[0]) if turned else shape)
        if healed and is_correctable(architecture, name, codec):
            weights[name] = corrected(name, weights[name], healed.rank, tensors)
        if stored_as and name in stored_as:
            rounded = RoundedWeight(weights[name], stored_as[name], architecture.is_transposed(name))
            # Rows of an embedding are looked up one by one, blocks are read whole.
            weights[name] = rounded if architecture.layer_of(name) is not None else rounded.rounded()
    for buffer_name, buffer in model.named_buffers():
        module, _, leaf = buffer_name.rpartition(".")
        model.get_submodule(module)._buffers[leaf] = buffer.to(device)

    head_module = model.get_submodule(architecture.head)
    head_name = architecture.embedding if architecture.tied else architecture.head
    bias = head_module.bias.data if head_module.bias is not None else None
    head = StreamedHead(weights[f"{head_name}.weight"], bias, logit_transform(config), dtype, device)
    model.engine = attach(model, architecture, weights, head, device, micro_batch_size, surrogates)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    model.architecture, model.streamed_head, model.mapped = architecture, head, tensors
    return model


def _narrow(model: nn.Module, architecture: Architecture) -> None:
    """Give the matrices around a feed-forward layer's neurons the sizes that are left."""
    for name in architecture.parameters:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight":
            continue
        linear = model.get_submodule(module)
        if (kept := architecture.neurons_out(module)) is not None:
            setattr(linear, "nf" if hasattr(linear, "nf") else "out_features", len(kept))
        if (kept := architecture.neurons_in(module)) is not None:
            setattr(linear, "nx" if hasattr(linear, "nx") else "in_features", len(kept))


def package_config(directory: Path) -> PretrainedConfig:
    """The transformers configuration of a package, without its note on quantization, which stock loaders read.

    Raises:
        ArtifactError: no readable `config.json`.
        ArchitectureError: the model wants custom code, or is none that transformers knows how to configure.
    """
    config = load_config(directory, of_package=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a package or checkpoint directory.

    Raises:
        ArtifactError: there is none, or its chat template is too long.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{directory} holds no tokenizer that transformers can load ({error}).") from error
    check_length(tokenizer.chat_template, directory)
    return tokenizer


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the adapter of a package's model for the full model, into `directory`, which may be there already.

    It speaks of the base's layers and has zeros for neurons that the package lacks, so that
    `PeftModel.from_pretrained` loads it on the base. `model.save_pretrained` would number the package's own blocks.

    Args:
        model: a `PeftModel` on what `load_package` gave.
        directory: gets PEFT's two files.

    Raises:
        ConfigError: another model, or an adapter that is more than A and B on blocks' matrices.
        OSError: the files can't be written.
    """
    streamed = model.get_base_model() if hasattr(model, "get_base_model") else None
    if not hasattr(streamed, "package") or "default" not in model.peft_config:
        raise ConfigError("save_adapter takes a package's model with a LoRA adapter (peft's `default`) on it.")
    architecture, config = streamed.architecture, model.peft_config["default"]
    adapted = {path: pair for path, *pair in adapter_parameters(model)}
    lora = LoraSettings(
        rank=config.r,
        alpha=config.lora_alpha,
        rslora=config.use_rslora,
        dropout=config.lora_dropout,
        targets=sorted({architecture.in_block(path) or path for path in adapted}) or None,
    )
    scales = {path: streamed.get_submodule(path).scaling["default"] for path in adapted}
    known = {id(A): A.shape[0] == lora.rank and scales[path] == lora.scale for path, (A, _) in adapted.items()}
    known |= {id(B): architecture.in_block(path) is not None for path, (_, B) in adapted.items()}
    for name, parameter in model.named_parameters():
        if (parameter.requires_grad or ".default" in name) and not known.get(id(parameter)):
            raise ConfigError(
                f"save_adapter takes plain LoRA on blocks' matrices, of one rank and scale; {name} is something else."
            )
    factors = get_factors(model, architecture, streamed.package.kept_layers)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_adapter(directory, factors, lora, architecture, streamed.package.base)


def _set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
