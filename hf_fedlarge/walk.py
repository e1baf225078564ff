"""A streamed model's decoder blocks one at a time, over sequences of one length, outside of its own forward.

Walking by layers instead of by sequences visits every block once, and two models can be walked side by side. What a
block is given besides the hidden states (positions, masks) is recorded once for each number of sequences: where all are
whole and of one length, it is always the same.

Shapes: B sequences of S tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_fedlarge.architectures import Architecture
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.linear import unused
from hf_fedlarge.loss import StreamedHead
from hf_fedlarge.memory import give_back_freed_memory
from hf_fedlarge.quantize import DenseWeight, FrozenWeight
from hf_fedlarge.rounding import dense


class Walk:
    """The blocks of a model for sequences of the length of `ids`.

    Args:
        model: from `package.load_package` or `package.stream_checkpoint`, in eval mode.
        ids: token ids (1, S) of any such sequence.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        self._model, self._ids = model, ids
        # A block is stepped through many times; meanwhile the next one's pages would only lie there.
        model.engine.reads_ahead = False
        self._blocks = list(model.get_submodule(model.architecture.blocks))
        # By how many sequences there are: Bloom's position biases have as many rows, and XGLM's masks.
        self._given: dict[int, dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._returns_tuple = isinstance(self._record(1), tuple)

    def _record(self, count: int) -> Any:
        """Find out what blocks are given besides the states of `count` sequences; what the first one returns then."""
        found = self._given[count] = {}
        outputs: list[Any] = []

        def given(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[block] = args[1:], kwargs

        hooks = [block.register_forward_pre_hook(given, with_kwargs=True) for block in self._blocks]
        hooks.append(self._blocks[0].register_forward_hook(lambda block, args, output: outputs.append(output)))
        self.forget()
        try:
            # What the blocks are given besides doesn't depend on the states, so one of them computes for all.
            with self._forwards(self._blocks[1:], lambda *args, **kwargs: outputs[0]):
                self._model.base_model(self._ids.expand(count, -1).to(self._device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        self.forget()
        return outputs[0]

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def architecture(self) -> Architecture:
        """The model's."""
        return self._model.architecture

    def block(self, number: int) -> nn.Module:
        """The block `number`."""
        return self._blocks[number]

    def dense(self, number: int, path: str) -> torch.Tensor:
        """A copy (in, out) of the matrix at `path` in block `number`, dequantized."""
        engine, block = self._model.engine, self._blocks[number]
        with engine.visit(block):
            return engine.linear_of[block.get_submodule(path)].dense().clone()

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """What the first block is given: (B, S, D) of token ids (B, S)."""
        if len(ids) not in self._given:  # before somebody else has hooks in the first block
            self._record(len(ids))

        def stop(block: nn.Module, args: tuple[Any, ...]) -> None:
            raise _ReachedError(args[0])

        hook = self._blocks[0].register_forward_pre_hook(stop)
        try:
            self._model.base_model(ids.to(self._device), use_cache=False)
        except _ReachedError as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise AssertionError("the model has no first block")

    @torch.no_grad()
    def step(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """The output (B, S, D) of block `number` for any number of sequences."""
        block = self._blocks[number]
        if len(hidden) not in self._given:
            self._record(len(hidden))
        args, kwargs = self._given[len(hidden)][block]
        output = block(hidden, *args, **kwargs)
        return output[0] if self._returns_tuple else output

    def step_with_input(self, number: int, path: str, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the module at `path` inside block `number` is given, and the block's output."""
        found: list[torch.Tensor] = []
        with hooked(self._blocks[number], path, lambda _, args, value: found.append(args[0])):
            output = self.step(number, hidden)
        return found[0], output

    @torch.no_grad()
    def inputs(self, number: int, paths: Sequence[str], hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """What modules inside block `number` are given, by their paths; the block goes no further than that."""
        found: dict[str, torch.Tensor] = {}

        def given(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            found[path] = args[0]
            if len(found) == len(paths):
                raise _ReachedError(hidden)

        modules = [(path, self._blocks[number].get_submodule(path)) for path in paths]
        hooks = [module.register_forward_pre_hook(partial(given, path)) for path, module in modules]
        try:
            with suppress(_ReachedError):
                self.step(number, hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @contextmanager
    def storing(self, number: int, matrices: Mapping[str, FrozenWeight]) -> Iterator[None]:
        """Within it, block `number` has other matrices (O, I) at some paths."""
        block, linear_of = self._blocks[number], self._model.engine.linear_of
        linears = {path: linear_of[block.get_submodule(path)] for path in matrices}
        own = {path: linear.weight for path, linear in linears.items()}
        try:
            for path, linear in linears.items():
                linear.weight = weight = matrices[path]
                if linear.stored_as_IO:
                    linear.weight = DenseWeight(dense(weight, torch.bfloat16).T.contiguous())
            self._hold()
            yield
        finally:
            for path, linear in linears.items():
                linear.weight = own[path]
            self._hold()

    def silent(self, number: int, paths: Iterable[str]) -> AbstractContextManager[None]:
        """Within it, the matrices at `paths` inside block `number` give zeros, and nothing is computed for them."""
        block, linear_of = self._blocks[number], self._model.engine.linear_of
        return unused([linear_of[block.get_submodule(path)] for path in paths])

    @torch.no_grad()
    def loss(self, hidden: torch.Tensor, ids: torch.Tensor) -> float:
        """Mean next-token loss of `ids` (1, S) for the last block's output (1, S, D), in nats."""
        with self._forwards(self._blocks, self._gives(lambda _: hidden)):
            return float(self._model(ids.to(self._device), labels=ids.to(self._device)).loss)

    @torch.no_grad()
    def finish(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """What the model's head is given, (B, S, D), where the last block's output for `ids` (B, S) is `hidden`."""
        with self._forwards(self._blocks, self._gives(lambda _: hidden)):
            return self._model.base_model(ids.to(self._device), use_cache=False).last_hidden_state

    @contextmanager
    def replaced(self, number: int, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Within it, the model has `function` of the hidden states in the place of block `number`."""
        with self._forwards([self._blocks[number]], self._gives(function)):
            yield

    def forget(self) -> None:
        """Take from this process the model's pages and its dense block, and from the allocator what it keeps."""
        self._hold()
        self._model.mapped.forget()
        give_back_freed_memory()

    def _hold(self) -> None:
        """Hold blocks whole, but none yet: one is stepped through many times in a row, and asked for its matrices."""
        self._model.engine.hold("block")

    @property
    def head(self) -> StreamedHead:
        """The model's."""
        return self._model.streamed_head

    @property
    def _device(self) -> torch.device:
        return self._model.engine.device

    def _gives(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
        """A block's `forward` that gives `function` of the hidden states."""
        if self._returns_tuple:
            return lambda hidden, *args, **kwargs: (function(hidden),)
        return lambda hidden, *args, **kwargs: function(hidden)

    @contextmanager
    def _forwards(self, blocks: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
        """Within it, these blocks compute `forward` instead of their own."""
        plain = [block.forward for block in blocks]
        for block in blocks:
            block.forward = forward
        try:
            yield
        finally:
            for block, own in zip(blocks, plain, strict=True):
                block.forward = own


def token_weights(states_ND: torch.Tensor) -> torch.Tensor:
    """How much each token counts in a fit, (N, 1), fp32: a few have states a hundred times as large as the others."""
    return 1 / states_ND.square().sum(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)


def check_finite(layer: int, states: Iterable[torch.Tensor]) -> None:
    """Refuse to go on with states behind a layer that no fit can be made to.

    Raises:
        ArtifactError: a value is infinite or not a number.
    """
    if not all(hidden.isfinite().all() for hidden in states):
        raise ArtifactError(
            f"The model computes infinity or NaN in layer {layer}: its weights are damaged or too large; fetch the "
            "checkpoint again, or take another."
        )


@contextmanager
def hooked(block: nn.Module, path: str, hook: Callable[..., Any]) -> Iterator[None]:
    """Within it, `hook` sees and may change what the module at `path` gives."""
    handle = block.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _ReachedError(Exception):
    """Ends a forward pass where an input is known; carries that of the first block."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden
