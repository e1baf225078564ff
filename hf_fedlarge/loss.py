"""The output head and the cross-entropy, a slice of the vocabulary at a time.

With a long vocabulary the logits dominate memory: 512 tokens × 49152 × 4 bytes are 100 MB, several times over. Here
neither the dense head nor the logits exist. Over one slice of the head after another the softmax's denominator and the
gradient of the hidden states accumulate with a running maximum, as FlashAttention does over keys (arXiv 2205.14135):
the gradient of log Σ exp is the softmax-weighted mean of the head's rows. One pass over the head, dequantized once,
gives the loss and its gradient, for labelled positions only. The label's own row is left out of the sums and enters
with the probability of everything else: for a confident model the difference of two nearly equal means would be noise.

Shapes: N labelled positions, D hidden, V vocabulary, R rows of the head in a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn

from hf_fedlarge.architectures import LogitTransform
from hf_fedlarge.errors import ConfigError, DataError
from hf_fedlarge.kernels import COMPUTED, kernels
from hf_fedlarge.processor import product_dtype
from hf_fedlarge.quantize import FrozenWeight

_SLICE_BYTES = 2**22  # logits of a slice and what is made of them should fit a CPU's cache
_POSITIONS = 1024
_AT_ONCE = 4096  # positions for a pass over the head; each holds its state some five times over meanwhile


class StreamedHead:
    """An output head whose rows are dequantized a slice at a time into one reused buffer.

    Args:
        weight: (V, D), as stored.
        bias: (V,) or None.
        transform: what the family does to its logits, applied in `cross_entropy`; `logits` gives them raw.
        dtype: of the logits that it returns, and what it is called with.
        device: where to compute.
    """

    def __init__(
        self,
        weight: FrozenWeight,
        bias: torch.Tensor | None,
        transform: LogitTransform,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.weight, self.bias, self.transform = weight, bias, transform
        self.dtype, self.device = dtype, device
        self.products = product_dtype(dtype, device)
        width = weight.shape[1] * self.products.itemsize
        self.rows = min(weight.shape[0], max(256, _SLICE_BYTES // width))
        self._buffer: torch.Tensor | None = None
        self._recorded: list[torch.Tensor] | None = None

    @contextmanager
    def recording(self) -> Iterator[list[torch.Tensor]]:
        """Within it, −log p of every position that `cross_entropy` sums up is kept: (N,) a call, fp32, on the CPU."""
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None

    def slices(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(start, stop, rows (R, D)) over the vocabulary; the rows are overwritten by the next slice."""
        vocabulary, width = self.weight.shape
        if self._buffer is None:
            with torch.inference_mode(False):  # else training could not write to it
                self._buffer = torch.empty(self.rows, width, dtype=self.products, device=self.device)
        for start in range(0, vocabulary, self.rows):
            stop = min(start + self.rows, vocabulary)
            rows_RD = self._buffer[: stop - start]
            self.weight.read_rows(start, stop, rows_RD)
            yield start, stop, rows_RD

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Raw logits (…, V) of hidden states (…, D), differentiable in the hidden states."""
        return _Logits.apply(hidden, self)

    def cross_entropy(self, hidden_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        """Sum over positions of −log p(label), fp32 scalar, differentiable in the hidden states."""
        return _CrossEntropy.apply(hidden_ND, labels_N, self)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: StreamedHead) -> torch.Tensor:
        ctx.head, ctx.dtype = head, hidden.dtype
        hidden = hidden.to(head.products)
        logits = hidden.new_empty(*hidden.shape[:-1], head.weight.shape[0], dtype=head.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start, stop, rows_RD in head.slices():
                logits[..., start:stop] = hidden @ rows_RD.T
        return logits if head.bias is None else logits.add_(head.bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total: Any = 0
        for start, stop, rows_RD in ctx.head.slices():
            total = total + (grad[..., start:stop].to(rows_RD.dtype) @ rows_RD).float()
        return total.to(ctx.dtype), None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, labels_N: torch.Tensor, head: StreamedHead) -> torch.Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            losses_N, grad_ND = _losses_and_gradient(
                hidden_ND.to(head.products), labels_N, head, ctx.needs_input_grad[0]
            )
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND.to(hidden_ND.dtype))
        if head._recorded is not None:
            head._recorded.append(losses_N.cpu())
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad.to(grad_ND.dtype), None, None


def _losses_and_gradient(
    hidden_ND: torch.Tensor, labels_N: torch.Tensor, head: StreamedHead, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    scale, cap = head.transform.scale, head.transform.cap
    count = len(labels_N)
    top_N = hidden_ND.new_full((count,), -torch.inf, dtype=torch.float32)
    others_N = torch.zeros_like(top_N)  # Σ exp(z − top) over all but the label
    label_logit_N = torch.zeros_like(top_N)
    # Taken from the slices as they come: the rows of a head that is larger than memory lie far apart.
    label_rows_ND = torch.empty_like(hidden_ND) if with_gradient else None
    grad_ND = torch.zeros(hidden_ND.shape, dtype=torch.float32, device=hidden_ND.device) if with_gradient else None

    is_plain = cap is None and head.bias is None and hidden_ND.device.type == "cpu" and hidden_ND.dtype in COMPUTED
    compiled = kernels() if is_plain else None
    for start, stop, rows_RD in head.slices():
        bias_R = None if head.bias is None else head.bias[start:stop].float()
        for first in range(0, count, _POSITIONS):
            part = slice(first, first + _POSITIONS)
            columns_N = labels_N[part] - start
            here_N = ((columns_N >= 0) & (columns_N < stop - start)).nonzero()[:, 0]
            own = here_N, columns_N[here_N]
            if label_rows_ND is not None:
                label_rows_ND[first + here_N] = rows_RD[own[1]]
            z_NR, slope_NR = hidden_ND[part] @ rows_RD.T, None
            sums = top_N[part], others_N[part], label_logit_N[part]
            if compiled is not None:
                decay_N = compiled.softmax_slice(z_NR, columns_N, scale, *sums)
            else:
                z_NR = z_NR.float()
                if bias_R is not None:
                    z_NR += bias_R
                if scale != 1.0:
                    z_NR *= scale
                if cap is not None:
                    z_NR = z_NR.div_(cap).tanh_().mul_(cap)
                    slope_NR = 1 - (z_NR / cap).square()
                decay_N = _softmax_slice(z_NR, own, *sums)
            if grad_ND is not None:
                if slope_NR is not None:
                    z_NR *= slope_NR
                grad_ND[part].mul_(decay_N[:, None]).add_(z_NR.to(rows_RD.dtype) @ rows_RD)

    sum_N = others_N + (label_logit_N - top_N).exp()
    losses_N = top_N + sum_N.log() - label_logit_N
    if grad_ND is None:
        return losses_N, None
    pull_N = others_N if cap is None else others_N * (1 - (label_logit_N / cap).square())
    return losses_N, grad_ND.sub_(label_rows_ND.float().mul_(pull_N[:, None])).mul_(scale / sum_N[:, None])


def _softmax_slice(
    z_NR: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor],
    top_N: torch.Tensor,
    others_N: torch.Tensor,
    label_logit_N: torch.Tensor,
) -> torch.Tensor:
    """`Kernels.softmax_slice` of fp32 logits, in torch; `own` are the labels' places."""
    label_logit_N[own[0]] = z_NR[own]
    new_top_N = torch.maximum(top_N, z_NR.amax(dim=1))
    decay_N = (top_N - new_top_N).exp()
    top_N.copy_(new_top_N)
    z_NR.sub_(new_top_N[:, None]).exp_()
    z_NR[own] = 0
    others_N.mul_(decay_N).add_(z_NR.sum(dim=1))
    return decay_N


def causal_loss(
    head: StreamedHead, hidden_BSD: torch.Tensor, labels_BS: torch.Tensor, items: torch.Tensor | int | None
) -> torch.Tensor:
    """Next-token cross-entropy over the labelled positions (label ≠ −100), fp32.

    Args:
        head: the output head.
        hidden_BSD: last hidden states.
        labels_BS: labels aligned with the inputs; shifted by one here, as transformers does.
        items: what to divide the sum by; None: the number of labelled positions.

    Raises:
        DataError: a label is neither −100 nor a token.
    """
    targets = labels_BS[:, 1:].to(hidden_BSD.device, torch.int64)
    mask = targets != -100
    hidden_ND, labels_N = hidden_BSD[:, :-1][mask], targets[mask]
    vocabulary = head.weight.shape[0]
    wrong_N = labels_N[(labels_N < 0) | (labels_N >= vocabulary)]
    if len(wrong_N):
        raise DataError(
            f"There is a label {int(wrong_N[0])}; expected tokens from 0 to {vocabulary - 1}, and -100 where nothing "
            "counts."
        )
    total = sum(map(head.cross_entropy, hidden_ND.split(_AT_ONCE), labels_N.split(_AT_ONCE)))
    if items is None:
        items = mask.sum().clamp(min=1)
    return total / items


class _Nothing(torch.Tensor):
    """What a streamed head shows as its weight: shape, dtype and device. Whoever reads its numbers gets an error."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Self:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Self:
        if operation not in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            raise ConfigError(
                "A streamed model's head has no dense weight, and something asked for it, as trl's own trainers do for "
                "a loss: let the model compute its loss or logits itself, with StreamingLoraTrainer or transformers' "
                "Trainer."
            )
        kept = {"dtype": args[0].dtype, "device": args[0].device}
        return cls(args[0].shape, **kept | {key: value for key, value in (kwargs or {}).items() if key in kept})

    def __repr__(self) -> str:
        return f"the weight of a streamed head, {tuple(self.shape)}"


def freeze_head(module: nn.Linear, head: StreamedHead) -> None:
    """Make an output head compute its logits by slices; it keeps no weight of its own."""
    nothing = _Nothing(torch.Size(head.weight.shape), head.dtype, head.device)
    module.weight = nn.Parameter(nothing, requires_grad=False)
    module.forward = head.logits
