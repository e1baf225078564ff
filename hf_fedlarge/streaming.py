"""The streaming engine: a decoder block's frozen matrices exist in dense form only while the block is visited.

The packed matrices stay memory-mapped. A visit dequantizes them into one arena that all blocks share and points the
block's layers there; after it they hold a NaN placeholder again, so that a use outside a visit shows at once. While
training, a block's forward runs without a graph and keeps only its input; its backward visits the block once more,
recomputes and differentiates it (activation checkpointing, arXiv 1604.06174). Micro-batches are looped inside the
visit, so that any number of them costs two dequantizations of a matrix an optimizer step, and the last block's stays
for its backward, which makes that one.

The engine attaches to a model: training loops, evaluation and `generate` of transformers work on it as on any other.
Left out: gradients of anything but adapters inside blocks, and a KV cache while gradients are computed.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_fedlarge.architectures import Architecture
from hf_fedlarge.errors import ArchitectureError
from hf_fedlarge.loss import StreamedHead, causal_loss, freeze_head
from hf_fedlarge.quantize import DenseWeight, FrozenWeight


@dataclass
class Counters:
    """What the engine did so far. `dequantizations` counts matrices, `visits` counts blocks."""

    visits: int = 0
    dequantizations: int = 0
    arena_bytes: int = 0


@dataclass
class FrozenLinear:
    """One frozen matrix of a block: its layer, its stored form, and its place in the arena, in the stored shape."""

    module: nn.Module
    weight: FrozenWeight
    transposed: bool
    dense: torch.Tensor = field(init=False)
    placeholder: torch.Tensor = field(init=False)

    def place(self, dense: torch.Tensor) -> None:
        """Give the matrix its slice of the arena, and the layer a placeholder of the same shape."""
        self.dense = dense.view(self.weight.shape)
        shown = self._as_layer_sees_it()
        self.placeholder = torch.full((1,), torch.nan, dtype=dense.dtype, device=dense.device).expand(shown.shape)
        self.module.weight = nn.Parameter(self.placeholder, requires_grad=False)

    def show(self) -> None:
        """Point the layer at the dense matrix."""
        self.module.weight.data = self._as_layer_sees_it()

    def hide(self) -> None:
        """Point the layer at the placeholder."""
        self.module.weight.data = self.placeholder

    def _as_layer_sees_it(self) -> torch.Tensor:
        return self.dense.t() if self.transposed else self.dense


class StreamingEngine:
    """Streams the blocks of one model.

    Args:
        blocks: the decoder blocks in order, each with its frozen matrices.
        dtype: of the dequantized weights and of the computation.
        device: where to compute.
        micro_batch_size: how many sequences a block computes at a time while training; None: the whole batch.
    """

    def __init__(
        self,
        blocks: list[tuple[nn.Module, list[FrozenLinear]]],
        dtype: torch.dtype,
        device: torch.device,
        micro_batch_size: int | None = None,
    ) -> None:
        self.micro_batch_size = micro_batch_size
        self.counters = Counters()
        self._resident: nn.Module | None = None
        self._linears: dict[nn.Module, list[FrozenLinear]] = dict(blocks)
        sizes = [sum(linear.weight.shape[0] * linear.weight.shape[1] for linear in linears) for _, linears in blocks]
        self._arena = torch.empty(max(sizes), dtype=dtype, device=device)
        self.counters.arena_bytes = self._arena.nbytes
        for block, linears in blocks:
            start = 0
            for linear in linears:
                count = linear.weight.shape[0] * linear.weight.shape[1]
                linear.place(self._arena[start : start + count])
                start += count
            block.forward = partial(self._forward, block, block.forward, inspect.signature(block.forward))

    @contextmanager
    def visit(self, block: nn.Module) -> Iterator[None]:
        """The block's dense matrices, for the time of the `with`."""
        linears = self._linears[block]
        self.counters.visits += 1
        if self._resident is not block:
            self._resident = None
            for linear in linears:
                linear.weight.read_rows(0, linear.weight.shape[0], linear.dense)
            self._resident = block
            self.counters.dequantizations += len(linears)
        for linear in linears:
            linear.show()
        try:
            yield
        finally:
            for linear in linears:
                linear.hide()

    def _forward(
        self,
        block: nn.Module,
        forward: Callable[..., Any],
        signature: inspect.Signature,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """What a block's `forward` is while it is streamed. The first argument is the hidden states in every family."""
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(parameter.name, {})
        hidden = arguments.pop(next(iter(signature.parameters)))
        parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
        caches = {key for key, value in arguments.items() if isinstance(value, Cache)}
        # In evaluation a cache is meant to be filled; in training it is transformers' default, which nobody reads.
        if torch.is_grad_enabled() and (parameters or hidden.requires_grad) and (block.training or not caches):
            # A recomputation would write to the cache a second time.
            arguments |= dict.fromkeys(caches)
            run = _Recomputation(self, block, forward, arguments)
            output = _BlockVisit.apply(run, hidden, *parameters)
            return output if run.companions is None else (output, *run.companions)
        with torch.no_grad(), self.visit(block):
            return forward(hidden, **arguments)


@dataclass
class _Recomputation:
    """One call of a block, to be made in forward and made again in backward.

    `companions` stand for what the block returns besides the hidden states, None for each: Falcon's attention weights.
    """

    engine: StreamingEngine
    block: nn.Module
    forward: Callable[..., Any]
    arguments: dict[str, Any]
    companions: tuple[None, ...] | None = None

    def parts(self, hidden: torch.Tensor) -> Iterator[tuple[slice, Callable[[torch.Tensor], torch.Tensor]]]:
        """(rows of the batch, the block as a function of their hidden states) for each micro-batch."""
        batch = hidden.shape[0]
        size = self.engine.micro_batch_size or batch
        if size >= batch:
            yield slice(0, batch), partial(self._call, self.arguments)
            return
        for start in range(0, batch, size):
            rows = slice(start, min(start + size, batch))
            yield rows, partial(self._call, _rows_of(self.arguments, rows, batch))

    def _call(self, arguments: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
        output = self.forward(hidden, **arguments)
        if isinstance(output, tuple):
            self.companions = (None,) * (len(output) - 1)
            return output[0]
        return output


class _BlockVisit(torch.autograd.Function):
    """A block without a graph; its backward recomputes it under the same autocast and random state.

    The trainable parameters come as inputs, so that their gradients reach hooks, such as those of data parallelism.
    """

    @staticmethod
    def forward(ctx: Any, run: _Recomputation, hidden: torch.Tensor, *parameters: nn.Parameter) -> torch.Tensor:
        kind = hidden.device.type
        ctx.run, ctx.parameters = run, parameters
        ctx.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        ctx.random = _random_state(hidden.device)
        ctx.save_for_backward(hidden)
        output = None
        with _autocast(kind, ctx.autocast), run.engine.visit(run.block):
            for rows, block in run.parts(hidden):
                part = block(hidden[rows])
                if rows == slice(0, len(hidden)):
                    return part
                output = part.new_empty(len(hidden), *part.shape[1:]) if output is None else output
                output[rows] = part
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        run, parameters = ctx.run, ctx.parameters
        wants_input = ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if wants_input else None
        # Whatever the computation's dtype, gradients of several micro-batches add up in fp32.
        sums = [torch.zeros(parameter.shape, device=parameter.device) for parameter in parameters]
        with (
            _restored_random_state(hidden.device, ctx.random),
            torch.enable_grad(),
            run.engine.visit(run.block),
        ):
            for rows, block in run.parts(hidden):
                inputs = hidden[rows].detach().requires_grad_(wants_input)
                wanted = [inputs, *parameters] if wants_input else list(parameters)
                with _autocast(hidden.device.type, ctx.autocast):
                    output = block(inputs)
                gradients = list(torch.autograd.grad(output, wanted, grad_output[rows], allow_unused=True))
                if wants_input:
                    grad_hidden[rows] = gradients.pop(0)
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        total += gradient
        return None, grad_hidden, *(total.to(p.dtype) for total, p in zip(sums, parameters, strict=True))


def attach(
    model: PreTrainedModel,
    architecture: Architecture,
    weights: dict[str, FrozenWeight],
    head: StreamedHead,
    device: torch.device,
    micro_batch_size: int | None = None,
) -> StreamingEngine:
    """Make `model`, whose matrices are empty, stream them from `weights`.

    Args:
        model: its vectors are filled in; block matrices, embedding and head may be on the meta device.
        architecture: where its blocks, embedding and head are.
        weights: parameter name → stored matrix, for every block matrix and the embedding.
        head: the output head.
        device: where to compute.
        micro_batch_size: see `StreamingEngine`.
    """
    blocks = []
    for number, block in enumerate(model.get_submodule(architecture.blocks)):
        linears = []
        for path in architecture.linears:
            weight = weights[f"{architecture.blocks}.{number}.{path}.weight"]
            # What is stored dense lies as the model has it; bitsandbytes wants (out, in).
            turned = path in architecture.transposed and not isinstance(weight, DenseWeight)
            linears.append(FrozenLinear(block.get_submodule(path), weight, turned))
        blocks.append((block, linears))
    engine = StreamingEngine(blocks, head.dtype, device, micro_batch_size)

    embedding, output = model.get_submodule(architecture.embedding), model.get_submodule(architecture.head)
    placeholder = torch.full((1,), torch.nan, dtype=head.dtype, device=device)
    _stream_embedding(embedding, weights[f"{architecture.embedding}.weight"], placeholder)
    output.weight = nn.Parameter(placeholder.expand(head.weight.shape), requires_grad=False)
    freeze_head(output, head)
    _stream_loss(model, head)
    return engine


def _stream_embedding(module: nn.Embedding, weight: FrozenWeight, placeholder: torch.Tensor) -> None:
    """Make an embedding look up only the rows that a batch uses, by its own `forward` (Gemma's scales them)."""
    forward = module.forward
    hidden = placeholder.expand(weight.shape)
    module.weight = nn.Parameter(hidden, requires_grad=False)
    module.padding_idx = None  # only matters to gradients, and is checked against the table's length

    def lookup(ids: torch.Tensor) -> torch.Tensor:
        used, places = ids.unique(return_inverse=True)
        module.weight.data = weight.gather(used, placeholder.dtype)
        try:
            return forward(places)
        finally:
            module.weight.data = hidden

    module.forward = lookup


def _stream_loss(model: PreTrainedModel, head: StreamedHead) -> None:
    """With `labels`, make the model's forward compute the loss by slices of the vocabulary; it returns no logits."""
    plain = model.forward

    @wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return plain(*args, **kwargs)
        kwargs |= {"use_cache": False}
        outputs = self.base_model(*args, **kwargs)
        loss = causal_loss(head, outputs.last_hidden_state, labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss)

    model.forward = types.MethodType(forward, model)


def _rows_of(value: Any, rows: slice, batch: int) -> Any:
    """The micro-batch's share of a block's arguments; what all sequences share (one row, or one axis) stays whole.

    Raises:
        ArchitectureError: an argument that is neither, such as Bloom's position biases of all heads of all sequences.
    """
    if isinstance(value, torch.Tensor):
        if value.dim() < 2 or value.shape[0] == 1:
            return value
        if value.shape[0] != batch:
            shape = "×".join(map(str, value.shape))
            raise ArchitectureError(f"A block takes a {shape} argument that can't be split; set no micro-batch size.")
        return value[rows]
    if isinstance(value, tuple | list):
        return type(value)(_rows_of(item, rows, batch) for item in value)
    if isinstance(value, dict):
        return {key: _rows_of(item, rows, batch) for key, item in value.items()}
    return value


def _autocast(kind: str, state: tuple[bool, torch.dtype]) -> torch.autocast:
    # Without the cache: casts made here without a graph must not serve where there is one.
    return torch.autocast(kind, enabled=state[0], dtype=state[1], cache_enabled=False)


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _restored_random_state(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
