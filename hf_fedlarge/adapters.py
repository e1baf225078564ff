"""LoRA adapters: on a model, as tensors, and as PEFT directories in global layer numbers.

Inside a client an adapter sits on the package's blocks, numbered from 0. Everywhere else it speaks of the base model's
layers, so that any directory written here loads on the full model with `PeftModel.from_pretrained`, nothing of ours
installed. peft is imported here alone. A client's `adapter_config.json` is never read; the manifest says what it is.
LoRA: arXiv 2106.09685.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from hf_fedlarge.architectures import Architecture
from hf_fedlarge.artifacts import CARRY_WEIGHTS, write_json
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.entries import BaseModelEntry
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.gated import Gated
from hf_fedlarge.linear import Adapter, FrozenLinear
from hf_fedlarge.tensors import Factors, SafetensorsWriter, StoredFactors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


def target_linears(architecture: Architecture, lora: LoraSettings) -> list[str]:
    """The matrices of a block that get an adapter: those whose path or last name is among `lora.targets`, or all.

    Raises:
        ConfigError: a target that no block has.
    """
    if lora.targets is None:
        return list(architecture.linears)
    known = {path.rpartition(".")[2] for path in architecture.linears} | set(architecture.linears)
    for target in lora.targets:
        if target not in known:
            raise ConfigError(
                f"The LoRA target {target!r} is no matrix of a {architecture.model_type} block; "
                f"choose among {', '.join(architecture.linears)}."
            )
    return [path for path in architecture.linears if {path, path.rpartition(".")[2]} & set(lora.targets)]


def expected_shapes(
    architecture: Architecture, layers: list[int], lora: LoraSettings
) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Module path in global numbers → shapes of A (r, in) and B (out, r) that an adapter on `layers` has.

    Args:
        architecture: of the package or of the full model; their blocks are alike.
        layers: global numbers of the layers that have adapters.
        lora: rank and targets.
    """
    shapes = {}
    for layer in layers:
        for path in target_linears(architecture, lora):
            out_features, in_features = _out_in(architecture, path)
            shapes[f"{architecture.blocks}.{layer}.{path}"] = ((lora.rank, in_features), (out_features, lora.rank))
    return shapes


def initial_factors(architecture: Architecture, layers: list[int], lora: LoraSettings, seed: int) -> dict[str, Factors]:
    """A fresh adapter, the same on every machine: A uniform within ±1/sqrt(in), as peft draws it, and B zero."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, (a_shape, b_shape) in expected_shapes(architecture, layers, lora).items():
        bound = a_shape[1] ** -0.5
        A_RI = torch.empty(a_shape).uniform_(-bound, bound, generator=generator)
        factors[module] = Factors(A_RI, torch.zeros(b_shape))
    return factors


def attach_lora(model: PreTrainedModel, architecture: Architecture, lora: LoraSettings) -> PeftModel:
    """Put trainable fp32 adapters on every block of `model`, which is changed in place and wrapped.

    Where the model is streamed, its engine computes a matrix and its adapter as one product.
    """
    with peft_warnings():
        peft_model = get_peft_model(model, _peft_config(architecture, lora))
    if hasattr(model, "engine"):
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                _fuse(layer, model.engine.linear_of[layer.base_layer], lora)
    return peft_model


def _fuse(layer: LoraLayer, linear: FrozenLinear, lora: LoraSettings) -> None:
    dropout = layer.lora_dropout["default"] if lora.dropout else None
    linear.adapter = Adapter(layer.lora_A["default"].weight, layer.lora_B["default"].weight, lora.scale, dropout)
    plain = layer.forward

    def forward(x: torch.Tensor | Gated, *args: Any, **kwargs: Any) -> torch.Tensor:
        # peft can switch adapters off or take other ones.
        if args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != ["default"]:
            return plain(x.value() if isinstance(x, Gated) else x, *args, **kwargs)
        linear.adapter.scale = layer.scaling["default"]  # as peft can change it, too
        return linear.forward_with_adapter(x)

    layer.forward, layer.takes_gated = forward, True


def set_trainable(model: PeftModel, trains: Literal["both", "A", "B"]) -> None:
    """Make both factors of every adapter trainable, or one, as FFA-LoRA does (arXiv 2403.12313); drop gradients."""
    for module in model.get_base_model().modules():
        if isinstance(module, LoraLayer):
            for letter, factor in (("A", module.lora_A), ("B", module.lora_B)):
                factor["default"].weight.requires_grad_(trains in ("both", letter)).grad = None


def set_factors(model: PeftModel, factors: dict[str, Factors], architecture: Architecture, layers: list[int]) -> None:
    """Load an adapter in global numbers into a model whose block b is the base's layer `layers[b]`.

    What it has for neurons that a block lacks is left out.
    """
    with torch.no_grad():
        for parameter, values in parameter_values(model, factors, architecture, layers):
            parameter.copy_(values)


def parameter_values(
    model: PeftModel, factors: dict[str, Factors], architecture: Architecture, layers: list[int]
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each parameter of the model's adapter with the values that `set_factors` would give it."""
    modules = dict(model.get_base_model().named_modules())
    for module, (A_RI, B_OR) in factors.items():
        here = _renumber(module, architecture, layers.index(architecture.layer_of(f"{module}.")))
        if (kept := architecture.neurons_in(here)) is not None:
            A_RI = A_RI[:, kept]
        if (kept := architecture.neurons_out(here)) is not None:
            B_OR = B_OR[kept]
        yield modules[here].lora_A["default"].weight, A_RI
        yield modules[here].lora_B["default"].weight, B_OR


def get_factors(
    model: PeftModel,
    architecture: Architecture,
    layers: list[int],
    of: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach,
) -> dict[str, Factors]:
    """The model's adapter in global numbers, copied to the CPU in fp32; zero for neurons that a block lacks.

    Args:
        model: with an adapter.
        architecture: its own.
        layers: which of the base's layers its blocks are.
        of: what to take of each parameter, of the same shape, such as its gradient.
    """
    factors = {}
    for path, A, B in adapter_parameters(model):
        layer = layers[architecture.layer_of(f"{path}.")]
        out_features, in_features = _out_in(architecture, architecture.in_block(path))
        A_RI = _widened(of(A), 1, architecture.neurons_in(path), in_features)
        B_OR = _widened(of(B), 0, architecture.neurons_out(path), out_features)
        factors[_renumber(path, architecture, layer)] = Factors(A_RI, B_OR)
    return factors


def adapter_parameters(model: PeftModel) -> Iterator[tuple[str, torch.nn.Parameter, torch.nn.Parameter]]:
    """The path of each matrix with an adapter in the model as it is, its A (R, in) and its B (out, R)."""
    for path, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            yield path, module.lora_A["default"].weight, module.lora_B["default"].weight


def _widened(values: torch.Tensor, dim: int, kept: torch.Tensor | None, size: int) -> torch.Tensor:
    """An fp32 copy on the CPU; where neurons were left out, with zeros in their places along `dim`, of `size` then."""
    if kept is None:
        return values.to("cpu", torch.float32, copy=True)
    shape = [*values.shape]
    shape[dim] = size
    return torch.zeros(shape).index_copy_(dim, kept, values.to("cpu", torch.float32))


def in_package(module: str, factors: Factors, architecture: Architecture, layers: list[int]) -> Factors:
    """What `get_factors` gives of one module after `set_factors`: zero for neurons that its block lacks."""
    here = _renumber(module, architecture, layers.index(architecture.layer_of(f"{module}.")))
    A_RI, B_OR = factors
    if (kept := architecture.neurons_in(here)) is not None:
        A_RI = _widened(A_RI[:, kept], 1, kept, A_RI.shape[1])
    if (kept := architecture.neurons_out(here)) is not None:
        B_OR = _widened(B_OR[kept], 0, kept, len(B_OR))
    return Factors(A_RI, B_OR)


def factor_name(module: str, letter: str) -> str:
    """PEFT's name of a module's A or B in a file."""
    return f"{_PREFIX}{module}.lora_{letter}.weight"


def write_adapter(
    directory: Path, factors: dict[str, Factors], lora: LoraSettings, architecture: Architecture, base: BaseModelEntry
) -> None:
    """Write PEFT's two files of an adapter in global layer numbers into `directory`, which exists."""
    write_config(directory, list(factors), lora, architecture, base)
    with AdapterWriter(directory) as writer:
        for module in sorted(factors):
            writer.write(module, factors[module])


def write_config(
    directory: Path, modules: list[str], lora: LoraSettings, architecture: Architecture, base: BaseModelEntry
) -> None:
    """Write PEFT's description of an adapter that has factors for `modules`."""
    config = _peft_config(
        architecture,
        lora,
        layers_to_transform=sorted({architecture.layer_of(f"{module}.") for module in modules}),
        layers_pattern=architecture.blocks.rpartition(".")[2],
        base_model_name_or_path=base.id,
        revision=base.revision,  # of the base: peft's `AutoPeftModel` loads that one
        inference_mode=True,
    )
    # peft keeps the targets as a set and writes them in its order, which differs from one process to the next.
    write_json(directory / ADAPTER_CONFIG, config.to_dict() | {"target_modules": sorted(config.target_modules)})


class AdapterReader:
    """An adapter's factors, one module at a time, from files that were checked before (`update.py`).

    Nothing is mapped, and what it keeps is small: hundreds of adapters can be open side by side. Of the files that an
    adapter needn't have, one that isn't there has no modules.
    """

    def __init__(self, directory: Path, name: str = ADAPTER_WEIGHTS) -> None:
        self._name = os.fspath(directory / name)
        self._places: _Places = {}
        if name != ADAPTER_WEIGHTS and not os.path.exists(self._name):
            return
        with open(self._name, "rb") as file:
            self._places = _places(file.read(int.from_bytes(file.read(8), "little")))

    @property
    def modules(self) -> list[str]:
        """Paths in global numbers, in the order of the file."""
        return list(self._places)

    def __contains__(self, module: str) -> bool:
        return module in self._places

    def read(self, module: str) -> Factors:
        """The fp32 factors of one module."""
        factors = Factors(*(torch.empty(shape, dtype=torch.float32) for _, shape in self._places[module]))
        self._fill(module, *(factor.numpy() for factor in factors))
        return factors

    def _fill(self, module: str, A_RI: np.ndarray, B_OR: np.ndarray) -> None:
        (start, _), (start_of_B, _) = self._places[module]
        pieces = (
            [(start, [A_RI, B_OR])] if start + A_RI.nbytes == start_of_B else [(start, [A_RI]), (start_of_B, [B_OR])]
        )
        # Files as Python has them take several calls more, at each of which threads of an aggregation wait for a lock.
        file = os.open(self._name, os.O_RDONLY)
        try:
            for start, arrays in pieces:
                assert os.preadv(file, arrays, start) == sum(a.nbytes for a in arrays), f"{self._name} ends too early"
        finally:
            os.close(file)

    def stored(self, module: str) -> StoredFactors:
        """Likewise, to be read when they are needed."""
        shapes = tuple(shape for _, shape in self._places[module])
        return StoredFactors(partial(self.read, module), shapes, partial(self._fill, module))


_Places = dict[str, tuple[tuple[int, list[int]], tuple[int, list[int]]]]


@lru_cache(maxsize=16)
def _places(header: bytes) -> _Places:
    """Module → where in the file A and B begin, and their shapes; made once for all clients' files, which are alike."""
    entries = json.loads(header)
    places = {}
    for name in entries:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            pair = [entries[factor_name(module, letter)] for letter in "AB"]
            assert all(entry["dtype"] == "F32" for entry in pair), f"{module} is not fp32"
            places[module] = tuple((8 + len(header) + entry["data_offsets"][0], entry["shape"]) for entry in pair)
    return places


class AdapterWriter:
    """Factors to a file as `AdapterReader` reads it, one module at a time; their ranks need not be known before.

    They wait in a file beside it, since a safetensors file begins with all shapes. Without any there will be no file.
    """

    def __init__(self, directory: Path, name: str = ADAPTER_WEIGHTS) -> None:
        self._path = directory / name
        self._waiting = self._path.with_name(f".{name}.waiting")
        self._file = self._waiting.open("wb")
        self._shapes: dict[str, tuple[int, ...]] = {}

    def write(self, module: str, factors: Factors) -> None:
        """The next module's factors, as fp32."""
        for letter, factor in zip("AB", factors, strict=True):
            self._shapes[factor_name(module, letter)] = tuple(factor.shape)
            self._file.write(factor.float().contiguous().numpy().data.cast("B"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._shapes:
            infos = {name: (torch.float32, shape) for name, shape in self._shapes.items()}
            with SafetensorsWriter(self._path, infos) as writer, self._waiting.open("rb") as file:
                for name, shape in self._shapes.items():
                    factor = torch.empty(shape, dtype=torch.float32)
                    file.readinto(factor.numpy().data.cast("B"))
                    writer.write(name, factor)
        self._waiting.unlink()


def read_factors(directory: Path) -> dict[str, Factors]:
    """Module path in global numbers → fp32 factors of an adapter whose files were checked before (`update.py`)."""
    reader = AdapterReader(directory)
    return {module: reader.read(module) for module in reader.modules}


def read_state(directory: Path, lora: LoraSettings) -> tuple[LoraSettings, dict[str, Factors]]:
    """The whole state of a federation, adapter and carry side by side as one adapter of a higher rank.

    Args:
        directory: an adapter whose files were checked before.
        lora: its settings, from its manifest.

    Returns:
        The settings of the whole, whose product counts as before, and module path → fp32 factors, filled up with zeros
        where a module has less to carry than others.
    """
    factors, carry = read_factors(directory), AdapterReader(directory, CARRY_WEIGHTS)
    if not carry.modules:
        return lora, factors
    carried = {module: carry.read(module) for module in carry.modules}
    rank = lora.rank + max(len(A_CI) for A_CI, _ in carried.values())
    for module, (A_RI, B_OR) in factors.items():
        whole = Factors(A_RI.new_zeros(rank, A_RI.shape[1]), B_OR.new_zeros(len(B_OR), rank))
        start = 0
        for A_XI, B_OX in [(A_RI, B_OR), *([carried[module]] if module in carried else [])]:
            whole.A_RI[start : start + len(A_XI)] = A_XI
            whole.B_OR[:, start : start + len(A_XI)] = B_OX
            start += len(A_XI)
        factors[module] = whole
    return lora.model_copy(update={"rank": rank, "alpha": lora.scale * rank, "rslora": False}), factors


def tensor_shapes(expected: dict[str, tuple[tuple[int, int], tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """Names and shapes of the tensors in an adapter's file, from `expected_shapes`."""
    return {factor_name(module, "AB"[place]): pair[place] for module, pair in expected.items() for place in (0, 1)}


@contextmanager
def peft_warnings() -> Iterator[None]:
    """Hide what peft 0.21 says that is not for our users: its own use of a name that transformers deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def _peft_config(architecture: Architecture, lora: LoraSettings, **more: Any) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        # PEFT matches a target by suffix; whole paths inside the block keep it from matching anything else.
        target_modules=sorted(target_linears(architecture, lora)),
        fan_in_fan_out=bool(architecture.transposed),
        task_type="CAUSAL_LM",
        **more,
    )


def _renumber(module: str, architecture: Architecture, layer: int) -> str:
    return architecture.in_layer(f"{module}.", layer).removesuffix(".")


def _out_in(architecture: Architecture, path: str) -> tuple[int, int]:
    shape = architecture.parameters[f"{architecture.blocks}.0.{path}.weight"]
    return (shape[1], shape[0]) if path in architecture.transposed else (shape[0], shape[1])
