"""What the rest needs to know of a model: where its decoder blocks are, which of their weights are matrices, its head.

Everything is read off an empty model built from its configuration, so that any decoder-only `AutoModelForCausalLM`
works without a table of families. A model that doesn't fit is refused by name, with the reason: encoder-decoders,
mixtures of experts, state-space and multimodal models, and such as need remote code, which is never run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from hf_fedlarge.errors import ArchitectureError, ArtifactError
from hf_fedlarge.positions import count_positions
from hf_fedlarge.untrusted import printable, read_json

logger = logging.getLogger(__name__)

_MAX_CONFIG_BYTES = 2**20
_MAX_LABELS = 10_000
# Fields that make a layer's arithmetic depend on its number or on how many there are, which dropping layers changes.
_LAYER_NUMBER_FIELDS = ("scale_attn_by_inverse_layer_idx", "attention_types", "lambda_std_dev", "scale_depth")

_ACTIVATIONS = tuple({kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()})


@dataclass(frozen=True)
class FeedForward:
    """Where a block's feed-forward layer is: a neuron is a row of each of `inputs` and a column of `output`."""

    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Architecture:
    """The layout of a decoder-only model. Names are module or parameter paths in the transformers model.

    Attributes:
        model_type: transformers' name of the family.
        blocks: path of the list of decoder blocks, such as `model.layers`.
        layers: how many blocks there are.
        linears: paths, inside a block, of its frozen matrices, such as `self_attn.q_proj`.
        transposed: those among `linears` stored as (in, out), as GPT-2's `Conv1D` does.
        embedding: path of the token embedding's module.
        head: path of the output head's module; `tied` says that it shares the embedding's weight.
        parameters: shape of every parameter, a tied head's weight left out, with all neurons.
        prefix: the base model's attribute, which some checkpoints leave out of their tensors' names.
        renamings: transformers' own, of names that checkpoints keep from earlier versions (GPT-NeoX's `embed_out`).
        feed_forward: a block's feed-forward layer, None where it isn't recognized (Phi-3 has gate and up in one matrix,
            Bloom an activation of its own).
        attention_output: path, inside a block, of the matrix that leads back from its attention; None: not found.
        positions: how many tokens of a sequence there are positions for; None: any number.
        neurons: the number of a block → which of its neurons stay, sorted; blocks that are not listed have all.
    """

    model_type: str
    blocks: str
    layers: int
    linears: tuple[str, ...]
    transposed: frozenset[str]
    embedding: str
    head: str
    tied: bool
    parameters: dict[str, tuple[int, ...]]
    prefix: str
    renamings: tuple[WeightRenaming, ...] = ()
    feed_forward: FeedForward | None = None
    attention_output: str | None = None
    positions: int | None = None
    neurons: Mapping[int, torch.Tensor] = field(default_factory=dict, compare=False)

    def layer_of(self, name: str) -> int | None:
        """The number of the block that the parameter or module `name` lies in, or None outside the blocks."""
        match = re.match(rf"{re.escape(self.blocks)}\.(\d+)\.", name)
        return int(match.group(1)) if match else None

    def in_layer(self, name: str, layer: int) -> str:
        """`name` of one block, renamed to lie in block `layer`."""
        return re.sub(rf"^{re.escape(self.blocks)}\.\d+\.", f"{self.blocks}.{layer}.", name)

    def in_block(self, name: str) -> str | None:
        """The path of the parameter or module `name` inside its block, or None outside the blocks."""
        return None if self.layer_of(name) is None else name.split(".", self.blocks.count(".") + 2)[-1]

    def is_transposed(self, name: str) -> bool:
        """Whether the parameter `name` is a block's matrix that the model stores as (in, out)."""
        return (self.in_block(name) or "").removesuffix(".weight") in self.transposed

    @property
    def neuron_count(self) -> int:
        """How many neurons a feed-forward layer has before any is left out; 0 where they can't be told apart."""
        if self.feed_forward is None:
            return 0
        name = f"{self.blocks}.0.{self.feed_forward.output}.weight"
        return self.parameters[name][0 if self.is_transposed(name) else 1]

    def neurons_in(self, module: str) -> torch.Tensor | None:
        """Which of its inputs the matrix `module` of a block takes, where some neurons were left out; else None."""
        is_output = self.feed_forward and self.in_block(module) == self.feed_forward.output
        return self.neurons.get(self.layer_of(module)) if is_output else None

    def neurons_out(self, module: str) -> torch.Tensor | None:
        """Likewise, which of its outputs it gives."""
        is_input = self.feed_forward and self.in_block(module) in self.feed_forward.inputs
        return self.neurons.get(self.layer_of(module)) if is_input else None

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter after neurons were left out."""
        shape = list(self.parameters[name])
        module, _, leaf = name.rpartition(".")
        turned = self.is_transposed(name)
        if (kept := self.neurons_out(module)) is not None:
            shape[1 if turned else 0] = len(kept)
        if leaf == "weight" and (kept := self.neurons_in(module)) is not None:
            shape[0 if turned else 1] = len(kept)
        return tuple(shape)

    def linear_weights(self, layer: int) -> list[str]:
        """Names of the frozen matrices of one block."""
        return [f"{self.blocks}.{layer}.{linear}.weight" for linear in self.linears]

    def tensor_names(self, stored: Iterable[str], where: Path) -> dict[str, str]:
        """Parameter name → the name a checkpoint stores it under.

        Raises:
            ArtifactError: a parameter is missing, or the checkpoint holds more layers than the model.
        """
        stored_as = {self._current_name(name): name for name in stored}
        names = {}
        for name in self.parameters:
            bare = name.removeprefix(f"{self.prefix}.")
            found = stored_as.get(name, stored_as.get(bare))
            if found is None and self.tied and name == f"{self.embedding}.weight":
                found = self.tied_head(stored_as.values())  # a tied matrix may be stored under either name
            if found is None:
                raise ArtifactError(f"{where} lacks the tensor {name} of a {self.model_type} model; fetch it again.")
            names[name] = found
        for name in sorted(set(stored_as.values()) - set(names.values())):
            layer = self.layer_of(name)
            layer = self.layer_of(f"{self.prefix}.{name}") if layer is None else layer
            if layer is not None and layer >= self.layers:
                raise ArtifactError(f"{where} holds {name}, but its config says that there are {self.layers} layers.")
        return names

    def tied_head(self, stored: Iterable[str]) -> str | None:
        """The name under which a checkpoint also has the head that is tied; None: it has not, or none is tied."""
        names = (name for name in stored if self.tied and self._current_name(name) == f"{self.head}.weight")
        return next(names, None)

    def _current_name(self, stored: str) -> str:
        for renaming in self.renamings:
            stored, _ = renaming.rename_source_key(stored)
        return stored


def load_config(directory: Path, *, of_package: bool = False) -> PretrainedConfig:
    """The configuration of a checkpoint or package directory; custom code is never run.

    A checkpoint of a family that transformers has may name its authors' code as well, as Phi-3's do: transformers' own
    is used, and nothing of that is in what is returned.

    Args:
        directory: what `config.json` is in.
        of_package: it was made by `shrink`: its weights may be quantized, and it names no code.

    Raises:
        ArtifactError: no readable `config.json`.
        ArchitectureError: the model needs custom code, or is none that transformers knows how to configure.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ArtifactError(f"{directory} has no config.json, so it is not a Hugging Face checkpoint.")
    raw = read_json(path, _MAX_CONFIG_BYTES)
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path} is not a JSON object; expected a model's configuration.")
    model_type = raw.get("model_type")
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if "auto_map" in raw:
        if of_package or not is_known:
            raise ArchitectureError(f"{path} asks for custom code (auto_map), which is never run; use a stock model.")
        _say_unused(path, model_type)
    for key, value in raw.items():
        if "implementation" in key and "/" in str(value):  # transformers would fetch and run a kernel of that name
            raise ArchitectureError(f"{path} asks for code of the Hub ({key!r:.80}), which is never run; remove it.")
    # transformers writes down a name for each.
    labels = raw.get("num_labels") or 0
    if not isinstance(labels, int) or labels > _MAX_LABELS:
        raise ArchitectureError(f"{path} has {labels!r:.80} labels; a language model has none: remove num_labels.")
    if "quantization_config" in raw and not of_package:
        method = raw["quantization_config"].get("quant_method") if isinstance(raw["quantization_config"], dict) else "?"
        raise ArchitectureError(f"{directory} is quantized already ({method}); shrink and merge need the full weights.")
    if not is_known:
        raise ArchitectureError(f"{path} names the unknown architecture {model_type!r:.80}.")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # each family's checks raise what they like
        raise ArchitectureError(f"{path} is no configuration of {model_type}: {_line(error)}.") from error
    if hasattr(config, "auto_map"):
        del config.auto_map
    return config


@cache
def _say_unused(path: Path, model_type: str) -> None:
    """Once for a file that is read many times."""
    logger.warning("%s names custom code, which isn't run; transformers' own %s is used.", path, model_type)


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose parameters are on the meta device and whose buffers are real; takes no memory to speak of.

    Raises:
        ArchitectureError: transformers can't make a model of these figures.
    """
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # likewise
        raise ArchitectureError(
            f"No {config.model_type} model can be made of its config.json: {_line(error)}."
        ) from error
    return model.eval().requires_grad_(False)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}, {printable(' '.join(str(error).split())):.200}"


def describe(config: PretrainedConfig) -> Architecture:
    """Find the blocks, matrices, embedding and head of the model that `config` describes.

    Raises:
        ArchitectureError: the model can't be shrunk and streamed; the message names it and says why.
    """
    name = (config.architectures or [config.model_type])[0]

    def refuse(reason: str) -> ArchitectureError:
        return ArchitectureError(f"{name} can't be used: {reason}; a decoder-only causal language model is expected.")

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder model")
    if config.get_text_config() is not config or hasattr(config, "vision_config"):
        raise refuse("it is a multimodal model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise refuse(f"transformers has no causal language model of the type {config.model_type!r}")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise refuse("it reads in both directions (an encoder)")
    if any(getattr(config, field, None) for field in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise refuse("it is a mixture of experts, which is not supported yet")
    for key in _LAYER_NUMBER_FIELDS:
        if getattr(config, key, None):
            raise refuse(f"its {key} makes a layer depend on its number or on how many there are")

    layers = getattr(config, "num_hidden_layers", None)
    model = empty_model(config, torch.bfloat16)
    if model._is_stateful:
        raise refuse("it is a state-space or recurrent model")
    stacks = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == layers
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    ]
    if len(stacks) != 1:
        raise refuse(f"it has {len(stacks)} stacks of {layers} decoder blocks instead of one")
    blocks = model.get_submodule(stacks[0])
    layouts = {tuple((path, value.shape) for path, value in block.named_parameters()) for block in blocks}
    if len(layouts) != 1:
        raise refuse("its decoder blocks differ in their parameters")
    linears = _linears(blocks[0])
    for path, parameter in blocks[0].named_parameters():
        if parameter.dim() > 1 and path.removesuffix(".weight") not in linears:
            shape = "×".join(map(str, parameter.shape))
            raise refuse(f"its block's parameter {path} ({shape}) is neither a linear layer's weight nor a vector")

    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise refuse("its embedding or its head is of an unusual kind")
    known = (f"{model.base_model_prefix}.", f"{paths[id(head)]}.")
    for path, _ in model.named_parameters():
        if not path.startswith(known):
            raise refuse(f"its parameter {path} stands between its blocks and its head")
    tied = bool(config.tie_word_embeddings)
    skipped = f"{paths[id(head)]}.weight" if tied else None
    return Architecture(
        model_type=config.model_type,
        blocks=stacks[0],
        layers=layers,
        linears=tuple(linears),
        transposed=frozenset(path for path, module in linears.items() if isinstance(module, Conv1D)),
        embedding=paths[id(embedding)],
        head=paths[id(head)],
        tied=tied,
        parameters={path: tuple(parameter.shape) for path, parameter in model.named_parameters() if path != skipped},
        prefix=model.base_model_prefix,
        renamings=tuple(item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)),
        feed_forward=_feed_forward(blocks[0]),
        attention_output=_attention_output(blocks[0], config.hidden_size),
        positions=count_positions(model),
    )


def shrink_config(config: PretrainedConfig, layers: list[int]) -> PretrainedConfig:
    """A copy of `config` for a model of only these layers; lists with one entry a layer are cut likewise."""
    values: dict[str, Any] = config.to_dict()
    total = config.num_hidden_layers
    # The family's own name of the field comes along: GPT-2 reads `n_layer`.
    field = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for key, value in values.items():
        if isinstance(value, list) and len(value) == total and key not in ("architectures", "eos_token_id"):
            values[key] = [value[layer] for layer in layers]
    values[field] = len(layers)
    if values.get("max_window_layers") is not None:
        values["max_window_layers"] = sum(layer < values["max_window_layers"] for layer in layers)
    return type(config).from_dict(values)


@dataclass(frozen=True)
class LogitTransform:
    """What a family does to its logits after the head: multiply by `scale`, then cap · tanh(logits / cap)."""

    scale: float = 1.0
    cap: float | None = None


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """The transform that this configuration asks for: Gemma 2 caps, Cohere multiplies, Granite divides."""
    scale = next(
        (
            value
            for field in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, field, None)) is not None
        ),
        1.0,
    )
    if getattr(config, "logits_scaling", None) is not None:
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    return LogitTransform(float(scale), getattr(config, "final_logit_softcapping", None))


def _linears(block: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _feed_forward(block: nn.Module) -> FeedForward | None:
    """The matrices around an activation: some of the same shape, and one after them that leads back."""
    for linears in _groups(block, active=True):
        *inputs, output = linears
        if all(out_in(linears[path]) == out_in(linears[output])[::-1] for path in inputs):
            return FeedForward(tuple(inputs), output)
    return None


def _attention_output(block: nn.Module, width: int) -> str | None:
    """The last matrix that gives hidden states, of the one module with several matrices and no activation."""
    outputs = [
        [path for path, linear in linears.items() if out_in(linear)[0] == width]
        for linears in _groups(block, active=False)
    ]
    found = [paths[-1] for paths in outputs if paths]
    return found[0] if len(found) == 1 else None


def _groups(block: nn.Module, active: bool) -> Iterator[dict[str, nn.Module]]:
    """By path, the matrices right inside each module that has several of them, and an activation or not."""
    for path, module in block.named_modules():
        children = dict(module.named_children())
        prefix = f"{path}." if path else ""
        linears = {prefix + name: child for name, child in children.items() if isinstance(child, nn.Linear | Conv1D)}
        if len(linears) > 1 and active == any(isinstance(child, _ACTIVATIONS) for child in children.values()):
            yield linears


def out_in(linear: nn.Module) -> tuple[int, int]:
    """How many outputs and inputs a linear layer has."""
    return (linear.nf, linear.nx) if isinstance(linear, Conv1D) else (linear.out_features, linear.in_features)
