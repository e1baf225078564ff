"""The streaming engine: a decoder block's frozen matrices exist in dense form only while the block is visited.

The packed matrices stay memory-mapped; a visit dequantizes them into an arena (`hf_fedlarge.arena`). While training, a
block's forward runs without a graph and keeps only its input; its backward visits the block once more, recomputes and
differentiates it (activation checkpointing, arXiv 1604.06174). All micro-batches of an optimizer step are computed
inside the visit, so that any number of them costs two dequantizations of a matrix, and the last block's stays for its
backward, which makes that one. Where the arena holds some rows at a time, every product dequantizes its matrix.

What is not computed: padding, which is left out (`hf_fedlarge.sequences`); the value of a block's output projections in
the recomputation, whose gradient asks for none; again what a memory budget allows to keep of the first forward pass
(`hf_fedlarge.budget`); a gradient of the first block's input.

It computes in the dtype the model was loaded in, also under autocast. Left out: gradients of anything but adapters
inside blocks, and a KV cache while gradients are computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

from hf_fedlarge.arena import Arena, Counters, Held, least_held
from hf_fedlarge.budget import Plan, plan_activations
from hf_fedlarge.errors import ArchitectureError, ConfigError
from hf_fedlarge.linear import FrozenLinear, output_products, unused
from hf_fedlarge.memory import used_bytes
from hf_fedlarge.passes import Pass, graph_bytes, random_state, restored_random_state
from hf_fedlarge.processor import product_dtype
from hf_fedlarge.sequences import Group, Rows, Span, group_spans


class StreamingEngine:
    """Streams the blocks of one model.

    Args:
        blocks: the decoder blocks in order, each with its frozen matrices.
        dtype: of the computation; products and dequantized weights may have another (`processor.product_dtype`).
        device: where to compute.
        takes_apart: whether the blocks' attention is `sequences`' own, so that padding can be left out.
        micro_batch_size: sequences of a training batch that a block computes at a time at least (see `Plan`); None:
            the whole batch.
    """

    def __init__(
        self,
        blocks: list[tuple[nn.Module, list[FrozenLinear]]],
        dtype: torch.dtype,
        device: torch.device,
        takes_apart: bool,
        micro_batch_size: int | None = None,
    ) -> None:
        self.micro_batch_size = micro_batch_size
        self.counters = Counters()
        # Whether the pages of the block that follows are read while one computes.
        self.reads_ahead = True
        self.dtype, self.device, self.takes_apart = dtype, device, takes_apart
        self.blocks = [block for block, _ in blocks]
        self.linears = [linears for _, linears in blocks]
        self._numbers = {block: number for number, block in enumerate(self.blocks)}
        # Which matrices' values no recomputation needs; found in a block's first one.
        self._outputs: dict[int, list[FrozenLinear]] = {}
        self._spans: list[Span] | None = None
        self._groups: list[Group] | None = None
        self._pass: Pass | None = None
        self._held = 0
        self._plan = Plan(group_tokens=0, kept=0)
        self._available: int | None = None
        self._largest: list[int] = []
        self._token_bytes: float | None = None
        self.linear_of = {linear.module: linear for linears in self.linears for linear in linears}
        self.hold(least_held(self.linears, dtype, device))
        for block in self.blocks:
            block.forward = partial(self._forward, block, block.forward, inspect.signature(block.forward))

    def set_memory_budget(self, budget: int, largest: Sequence[int] = ()) -> None:
        """Hold as much of the forward pass as fits into `budget` bytes, and no whole block where that is too much.

        The budget is for this process's own memory (on CUDA: for the device's): libraries, adapters, their gradients
        and optimizer state, arena and activations. Mapped package files are left out, as the system takes their pages
        back when it needs them. What fits decides how sequences are grouped, so the rounding of two runs may differ.
        The first batch is refused where the largest to come, of sequences of the lengths `largest`, would not fit.

        Raises:
            ConfigError: not even some rows of a matrix at a time fit.
        """
        trainable = [p for block in self.blocks for p in block.parameters() if p.requires_grad]
        # A gradient and, at most, two fp32 moments for each trainable value.
        own = used_bytes(self.device) - self.arena.held_bytes + 12 * sum(p.numel() for p in trainable)
        available = budget - own
        # At least as much again as the arena has is left to activations.
        held = least_held(self.linears, self.dtype, self.device, available)
        needed = Arena.bytes_needed(self.linears, product_dtype(self.dtype, self.device), self.device, held)
        if 2 * needed > available:
            raise ConfigError(
                f"The memory budget of {budget / 1e6:.0f} MB is too small: {own / 1e6:.0f} MB are in use without any "
                f"activation, and a matrix's rows take {needed / 1e6:.0f} MB; give at least "
                f"{(own + 2 * needed) / 1e6:.0f} MB."
            )
        self.hold(held)
        self._available, self._largest = available - self.counters.arena_bytes, list(largest)

    def hold(self, held: Held) -> None:
        """Hold a whole block's dense matrices at a time, or some rows of a matrix, or nothing (see `Arena`)."""
        self.arena = Arena(self.linears, self.dtype, self.device, held, self.counters)

    def start_over(self) -> None:
        """Forget what was learned and counted, as if nothing had been computed so far; a memory budget stays."""
        self._outputs.clear()
        self._token_bytes, self._held, self._pass, self._largest = None, 0, None, []
        arena_bytes = self.counters.arena_bytes
        vars(self.counters).update(vars(Counters(arena_bytes=arena_bytes)))

    @contextmanager
    def visit(self, block: nn.Module, following: int | None = None) -> Iterator[None]:
        """The block's dense matrices, for the time of the `with`; `following` is likely to be visited next."""
        number = self._numbers[block]
        self.counters.visits += 1
        if not self.reads_ahead or following is None or not 0 <= following < len(self.blocks):
            following = None
        # A block that transformers checkpoints would be computed yet once more.
        checkpointing, block.gradient_checkpointing = getattr(block, "gradient_checkpointing", False), False
        self.arena.enter(number, following)
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            self.arena.leave(number, following)
            block.gradient_checkpointing = checkpointing

    @contextmanager
    def batch(self, spans: list[Span]) -> Iterator[None]:
        """Within it, blocks are called with a row of these sequences."""
        self._spans, self._groups = spans, None
        try:
            yield
        finally:
            self._spans = self._groups = None

    def _forward(
        self,
        block: nn.Module,
        forward: Callable[..., Any],
        signature: inspect.Signature,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """What a block's `forward` is while it is streamed. The first argument is the hidden states in every family."""
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(parameter.name, {})
        hidden = arguments.pop(next(iter(signature.parameters)))
        parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
        caches = {key for key, value in arguments.items() if isinstance(value, Cache)}
        call = _BlockCall(self, self._numbers[block], forward, arguments, torch.is_grad_enabled())
        # In evaluation a cache is meant to be filled; in training it is transformers' default, which nobody reads.
        if torch.is_grad_enabled() and (parameters or hidden.requires_grad) and (block.training or not caches):
            # A recomputation would write to the cache a second time.
            arguments |= dict.fromkeys(caches)
            call.passing = self._pass_of(call.number, hidden)
            output = _BlockVisit.apply(call, hidden, *parameters)
            return output if call.companions is None else (output, *call.companions)
        with torch.no_grad(), self.visit(block, call.number + 1):
            if self._spans is None:
                return forward(hidden, **arguments)
            call.parts = self.divide(call, hidden)
            output = call.assemble(hidden, lambda place, part, inputs: call.make(part, inputs))
            return output if call.companions is None else (output, *call.companions)

    def _pass_of(self, number: int, hidden: torch.Tensor) -> Pass:
        """The forward pass in which the block `number` is called; the blocks of one are called in order."""
        found = self._pass
        # What a block that failed left behind is of no use.
        if found is None or not number or found.following != number:
            found = Pass(hidden, number, len(self.blocks))
        # Whose last block is called belongs to its graph alone.
        self._pass = found if number + 1 < len(self.blocks) else None
        return found

    def divide(self, call: _BlockCall, hidden: torch.Tensor) -> list[_Part]:
        """What a training batch is computed in; within a visit."""
        batch = hidden.shape[:2]
        if self._groups is None or self._spans is None:
            spans = self._spans or [Span(row, 0, batch[1]) for row in range(batch[0])]
            if call.number == 0 or self._token_bytes is None:
                self._make_plan(call, hidden, spans)
            self._groups = [Group(group, batch, hidden.device) for group in group_spans(spans, self._plan.group_tokens)]
        if self.takes_apart:
            parts = [_Part(group, group.lay(call.arguments)) for group in self._groups]
            if all(part.laid is not None for part in parts):
                return parts
            if self._spans is not None:
                raise ArchitectureError(
                    "A block takes an argument that is neither a token's nor a mask, so its batches can't be divided; "
                    "this family is not supported yet."
                )
        size = self.micro_batch_size or batch[0]
        if self._available is not None:
            size = max(1, self._plan.group_tokens // batch[1])
        rows = [Rows(slice(first, min(first + size, batch[0])), batch) for first in range(0, batch[0], size)]
        return [_Part(part, part.lay(call.arguments)) for part in rows]

    def _make_plan(self, call: _BlockCall, hidden: torch.Tensor, spans: list[Span]) -> None:
        plan = partial(self._planned, call.number, hidden[0, 0].nbytes)
        if self._token_bytes is None and not torch.is_inference_mode_enabled():
            self._token_bytes = self._measure(call, hidden, spans[0])
            if self._largest:  # now, and not in the middle of training
                plan(self._largest, differentiable=True)
        self._held = 0
        self._plan = plan([len(span) for span in spans], differentiable=call.differentiable)

    def _planned(self, number: int, boundary_bytes: int, lengths: list[int], differentiable: bool) -> Plan:
        """The plan for a batch, within the visit of a block. Where a whole block leaves no room, rows are held."""
        blocks, at_once = len(self.blocks), self.micro_batch_size
        if not differentiable:  # no block's input is kept, and more at once than products need only takes memory
            blocks, at_once = 1, at_once or 1
        plan = partial(plan_activations, lengths, blocks, micro_batch_size=at_once)
        if self._token_bytes is None:
            return plan()
        plan = partial(plan, token_bytes=self._token_bytes, boundary_bytes=boundary_bytes)
        try:
            return plan(available=self._available, cast_bytes=self.arena.cast_bytes)
        except ConfigError:
            if self.arena.held != "block":
                raise
        self._hold_rows(number)
        return plan(available=self._available, cast_bytes=self.arena.cast_bytes)

    def _hold_rows(self, number: int) -> None:
        """Hold rows of matrices from now on, under a memory budget; within the visit of a block."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # another stream may write to what is given back now
        self.arena.leave(number, None)
        self._available += self.counters.arena_bytes
        self.hold("rows")
        self._available -= self.counters.arena_bytes
        self.arena.enter(number, None)

    def _measure(self, call: _BlockCall, hidden: torch.Tensor, span: Span) -> float:
        """Bytes that the graph of a block holds for a token, from its forward for one sequence."""
        part: Group | Rows = Group([span], hidden.shape[:2], hidden.device)
        laid = part.lay(call.arguments) if self.takes_apart else None
        if laid is None:
            part = Rows(slice(0, len(hidden)), hidden.shape[:2])
            laid = part.lay(call.arguments)

        def forward() -> None:
            call.make(_Part(part, laid), part.take(hidden).detach().requires_grad_())

        return graph_bytes(forward, self.device) / part.tokens

    def outputs_of(self, number: int) -> list[FrozenLinear]:
        """The output projections of a block, as far as they are known."""
        return self._outputs.get(number, [])

    def learn_outputs(self, number: int, output: torch.Tensor) -> None:
        """Find a block's output projections in the graph of its first recomputation."""
        if number not in self._outputs:
            self._outputs[number] = list(output_products(output))

    def count_held(self, hidden: torch.Tensor, kept_tokens: list[int]) -> None:
        """Note what a block's forward left for its backward."""
        self._held += hidden.nbytes + int(sum(kept_tokens) * self._token_bytes)
        self.counters.activation_bytes = max(self.counters.activation_bytes, self._held)

    def keeps(self, number: int, place: int, parts: int) -> bool:
        """Whether the graph of this part of this block is kept for the backward."""
        return (len(self.blocks) - number) * parts - place - 1 < self._plan.kept


@dataclass
class _Part:
    """Some of a batch, and a block's arguments for it with the masks of its sequences."""

    group: Group | Rows
    laid: tuple[dict[str, Any], list[torch.Tensor | None]] | None


@dataclass
class _BlockCall:
    """One call of a block, to be made in forward and made again in backward.

    `companions` stand for what the block returns besides the hidden states, None for each: Falcon's attention weights.
    `differentiable`: gradients may be asked for of a block of this pass, if not of this one.
    """

    engine: StreamingEngine
    number: int
    forward: Callable[..., Any]
    arguments: dict[str, Any]
    differentiable: bool
    parts: list[_Part] = field(default_factory=list)
    passing: Pass | None = None
    companions: tuple[None, ...] | None = None

    def make(self, part: _Part, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for a part's hidden states."""
        arguments, masks = part.laid
        with part.group.attention(masks):
            output = self.forward(hidden, **arguments)
        if isinstance(output, tuple):
            self.companions = (None,) * (len(output) - 1)
            return output[0]
        return output

    def assemble(self, hidden: torch.Tensor, make: Callable[[int, _Part, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What `make` gives for every part of the hidden states, each at its place."""
        first = self.parts[0]
        if first.group.is_whole:
            return first.group.real(make(0, first, first.group.take(hidden))).reshape(hidden.shape)
        output = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        for place, part in enumerate(self.parts):
            part.group.put(make(place, part, part.group.take(hidden)), output)
        return output

    def make_again(self, part: _Part, hidden: torch.Tensor) -> torch.Tensor:
        """Likewise, for its graph alone: the values of the block's output projections are not computed."""
        with unused(self.engine.outputs_of(self.number)):
            output = self.make(part, hidden)
        self.engine.learn_outputs(self.number, output)
        return output


class _BlockVisit(torch.autograd.Function):
    """A block without a graph; its backward recomputes it under the same random state.

    The trainable parameters come as inputs, so that their gradients reach hooks, such as those of data parallelism.
    """

    @staticmethod
    def forward(ctx: Any, call: _BlockCall, hidden: torch.Tensor, *parameters: nn.Parameter) -> torch.Tensor:
        engine = call.engine
        ctx.call, ctx.parameters = call, parameters
        ctx.kept, ctx.random = {}, []
        ctx.save_for_backward(hidden)
        with engine.visit(engine.blocks[call.number], call.number + 1):
            call.parts = engine.divide(call, hidden)

            def make(place: int, part: _Part, inputs: torch.Tensor) -> torch.Tensor:
                ctx.random.append(random_state(hidden.device))
                if not engine.keeps(call.number, place, len(call.parts)):
                    return call.make(part, inputs)
                with torch.enable_grad():
                    inputs = inputs.detach().requires_grad_(ctx.needs_input_grad[1])
                    ctx.kept[place] = inputs, call.make(part, inputs)
                return ctx.kept[place][1].detach()

            output = call.passing.keep(call.assemble(hidden, make))
        engine.count_held(hidden, [part.group.tokens for place, part in enumerate(call.parts) if place in ctx.kept])
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        call, parameters, engine = ctx.call, ctx.parameters, ctx.call.engine
        wants_input = ctx.needs_input_grad[1]
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wants_input else None
        # Taken at once, before what the block needs for a moment, as the states are.
        sizes = [parameter.numel() for parameter in parameters]
        room = torch.empty(sum(sizes), dtype=torch.float32, device=hidden.device).split(sizes)
        sums = [total.view(parameter.shape) for total, parameter in zip(room, parameters, strict=True)]
        found = [False] * len(parameters)
        with torch.enable_grad(), engine.visit(engine.blocks[call.number], call.number - 1):
            # What was kept came last and goes first.
            for place, part in reversed(list(enumerate(call.parts))):
                inputs, output = ctx.kept.pop(place, (None, None))
                if output is None:
                    inputs = part.group.take(hidden).detach().requires_grad_(wants_input)
                    with restored_random_state(hidden.device, ctx.random[place]):
                        output = call.make_again(part, inputs)
                wanted = [inputs, *parameters] if wants_input else list(parameters)
                gradients = list(torch.autograd.grad(output, wanted, part.group.take(grad_output), allow_unused=True))
                if wants_input:
                    part.group.put(gradients.pop(0), grad_hidden)
                for number, gradient in enumerate(gradients):
                    if gradient is not None:
                        (sums[number].add_ if found[number] else sums[number].copy_)(gradient)
                        found[number] = True
        return None, grad_hidden, *(total if is_found else None for total, is_found in zip(sums, found, strict=True))
