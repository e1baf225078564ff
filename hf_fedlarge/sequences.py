"""The sequences of a batch, laid end to end without padding, a group at a time, for a decoder block to compute.

A block's matrices and norms treat every token alike; only attention asks which sequence a token is of. So a group of
sequences goes through a block as one row of tokens, and attention, which this module registers with transformers under
`ATTENTION`, takes the row apart again. Hardly a product is spent on padding, many short sequences make one large one,
and attention never crosses from one sequence to the next. Batches that trl packs without padding are the same thing
already laid out.

Shapes: B rows and S columns of the batch, T tokens of a group, H heads, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_fedlarge.attention import causal_attention
from hf_fedlarge.errors import ArchitectureError

ATTENTION = "hf_fedlarge"
_MASKS = ("attention_mask", "causal_mask")
_MULTIPLE = 64  # of tokens
Masks = list[torch.Tensor | None]  # None: plain causal attention, for which there are better kernels


@dataclass(frozen=True)
class Span:
    """One sequence: the columns [start, stop) of a row of the batch."""

    row: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Row:
    """A batch laid end to end: token ids, labels and positions (1, T), and where in it each sequence is."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    spans: list[Span]


def lay_end_to_end(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> Row | None:
    """A batch without its padding; None if it has other padding than on the right, or positions of its own.

    Args:
        input_ids: (B, S).
        labels: (B, S).
        attention_mask: (B, S), 1 where there is a token; None: everywhere.
        position_ids: (1, S) of a batch that lies end to end already, 0 where a sequence begins; else None.
    """
    rows, columns = input_ids.shape
    if position_ids is not None:
        starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
        if attention_mask is not None or rows != 1 or not starts or starts[0] != 0:
            return None
        spans = [Span(0, *pair) for pair in zip(starts, [*starts[1:], columns], strict=True)]
        return Row(input_ids, labels, position_ids, spans)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = torch.arange(columns, device=mask.device).expand(rows, columns)
    lengths = mask.sum(dim=1)
    real = positions < lengths[:, None]
    if mask.shape != input_ids.shape or not torch.equal(mask.bool(), real):
        return None
    ends = lengths.cumsum(0).tolist()
    spans = [Span(0, start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True) if end > start]
    # A sequence's first token is no target: what stands before it now is another sequence.
    labels = labels.masked_fill(positions == 0, -100)
    return Row(input_ids[real][None], labels[real][None], positions[real][None], spans)


def group_spans(spans: list[Span], tokens: int) -> list[list[Span]]:
    """The sequences in order, as many in a group as have no more than `tokens` together, at least one."""
    groups: list[list[Span]] = []
    filled = 0
    for span in spans:
        if not groups or filled + len(span) > tokens:
            groups.append([])
            filled = 0
        groups[-1].append(span)
        filled += len(span)
    return groups


class Group:
    """Sequences that a block computes together, and how to lay its arguments end to end for them.

    Behind sequences of different lengths comes a filler, zeros that attend to themselves, so that T is a multiple of
    64: for every number of rows that it sees for the first time, oneDNN compiles each of a block's products anew.

    Args:
        spans: the sequences, each beginning where the one before it ends.
        batch: B and S.
        device: of the batch.

    Attributes:
        tokens: T, with the filler.
        is_whole: whether the sequences are all of the batch.
    """

    def __init__(self, spans: list[Span], batch: torch.Size, device: torch.device) -> None:
        self._sequences, self._batch, columns = spans, batch, batch[1]
        lengths = [len(span) for span in spans]
        self._real = sum(lengths)
        is_batch = len(spans) > 1 and len(set(lengths)) == 1  # which attention computes at once
        self._filler = 0 if is_batch else -self._real % _MULTIPLE
        self.tokens = self._real + self._filler
        self.is_whole = self._real == batch.numel()
        starts = [span.row * columns + span.start for span in spans]
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        assert starts[1:] == ends[:-1], "sequences of a group lie end to end"
        self._places = slice(starts[0], ends[-1])
        self.spans = [*spans, Span(spans[-1].row, 0, self._filler)] if self._filler else spans
        columns_of = [torch.arange(span.start, span.stop, device=device) for span in spans]
        self._columns = torch.cat([*columns_of, torch.zeros(self._filler, dtype=torch.long, device=device)])
        self._cut: dict[int, tuple[torch.Tensor, Masks]] = {}

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """(1, T, …) of (B, S, …)."""
        real = values.flatten(0, 1)[self._places]
        if self._filler:
            real = torch.cat([real, real.new_zeros(self._filler, *real.shape[1:])])
        return real[None]

    def real(self, values: torch.Tensor) -> torch.Tensor:
        """(1, T, …) without the filler."""
        return values[:, : self._real]

    def put(self, values: torch.Tensor, into: torch.Tensor) -> None:
        """Write (1, T, …) to its places in (B, S, …)."""
        into.flatten(0, 1)[self._places] = self.real(values)[0]

    def lay(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], Masks] | None:
        """A block's arguments for these sequences, and what is taken out of them: each sequence's attention mask.

        None if an argument can't be laid end to end.
        """
        found: list[torch.Tensor] = []
        try:
            laid = {name: self._lay(value, name, found) for name, value in arguments.items()}
        except _CannotLayError:
            return None
        return laid, self._masks(found[0]) if found else [None] * len(self.spans)

    @contextmanager
    def attention(self, masks: Masks) -> Iterator[None]:
        """Attention within each sequence alone."""
        token = _current.set((self.spans, masks))
        try:
            yield
        finally:
            _current.reset(token)

    def _masks(self, mask: torch.Tensor) -> Masks:
        # All blocks of a model share a mask or two.
        if id(mask) not in self._cut:
            masks = [_cut(mask, span, self._batch[1]) for span in self._sequences]
            self._cut[id(mask)] = mask, [*masks, *[None] * (len(self.spans) - len(masks))]
        return self._cut[id(mask)][1]

    def _lay(self, value: Any, name: str, found: list[torch.Tensor]) -> Any:
        rows, columns = self._batch
        if isinstance(value, torch.Tensor):
            if value.dim() < 2:
                return value
            if value.dim() == 4 and name in _MASKS and value.shape[-2] == value.shape[-1] and not found:
                found.append(value)
                return None
            if value.shape[:2] == (rows, columns):
                return self.take(value)
            if value.shape[:2] == (1, columns):
                return value[:, self._columns]
            raise _CannotLayError
        if isinstance(value, tuple | list):
            return type(value)(self._lay(item, name, found) for item in value)
        if isinstance(value, dict):
            return {key: self._lay(item, name, found) for key, item in value.items()}
        return value


class Rows:
    """Whole rows of a batch, for blocks whose attention isn't ours to take apart. The interface is `Group`'s.

    Args:
        rows: which.
        batch: B and S.
    """

    def __init__(self, rows: slice, batch: torch.Size) -> None:
        self.rows, self._batch = rows, batch
        self.tokens = (rows.stop - rows.start) * batch[1]
        self.is_whole = rows == slice(0, batch[0])

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of (B, …)."""
        return values[self.rows]

    def real(self, values: torch.Tensor) -> torch.Tensor:
        """All of them."""
        return values

    def put(self, values: torch.Tensor, into: torch.Tensor) -> None:
        """Write the rows to their places in (B, …)."""
        into[self.rows] = values

    def lay(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], Masks]:
        """A block's arguments for these rows; what all rows share (one row, or one axis) stays whole.

        Raises:
            ArchitectureError: an argument that is neither, such as Bloom's position biases of all heads of all rows.
        """
        return (arguments if self.is_whole else {name: self._of(value) for name, value in arguments.items()}), []

    @contextmanager
    def attention(self, masks: Masks) -> Iterator[None]:
        """Nothing: the blocks' own attention knows about rows."""
        yield

    def _of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.dim() < 2 or value.shape[0] == 1:
                return value
            # Position biases have heads first, of which there may be as many as rows.
            if value.shape[0] == self._batch[0] and (value.dim() == 4 or value.shape[1] == self._batch[1]):
                return value[self.rows]
            shape = "×".join(map(str, value.shape))
            raise ArchitectureError(
                f"A block takes a {shape} argument, by which a batch can't be divided; set "
                "--gradient_accumulation_steps 1 and no --memory_budget."
            )
        if isinstance(value, tuple | list):
            return type(value)(self._of(item) for item in value)
        if isinstance(value, dict):
            return {key: self._of(item) for key, item in value.items()}
        return value


class _CannotLayError(Exception):
    pass


def _cut(mask: torch.Tensor, span: Span, columns: int) -> torch.Tensor | None:
    # The mask is of whole rows, or, as `_mask` makes it, of the longest sequence.
    first = span.start if mask.shape[-1] == columns else 0
    part = slice(first, first + len(span))
    own = mask[span.row if len(mask) > 1 else 0, :, part, part]
    causal = torch.ones(len(span), len(span), dtype=torch.bool, device=mask.device).tril()
    allowed = own if own.dtype == torch.bool else own == 0
    return None if torch.equal(allowed, causal.expand_as(allowed)) else own[None]


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention, sequence by sequence; query, key and value are (1, H, T, D / H)."""
    current = _current.get()
    if current is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    spans, masks = current
    lengths = [len(span) for span in spans]
    count, length = len(lengths), lengths[0]
    if lengths == [length] * count and not any(mask is not None for mask in masks):
        # Of one length: a batch. (1, H, T, d) → (count, H, length, d)
        parts = [x.unflatten(2, (count, length))[0].transpose(0, 1) for x in (query, key, value)]
        return _sdpa(module, *parts, None, **kwargs).flatten(0, 1)[None], None
    outputs = [
        _sdpa(module, *parts, mask, **kwargs)
        for *parts, mask in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), masks, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def _sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    dtype = query.dtype
    if torch.is_grad_enabled() and query.device.type == "cpu":
        if mask is None and _is_plain(module, query, value, **kwargs):
            return causal_attention(query, key, value, kwargs.get("scaling"))
        # On a CPU the gradient of torch's flash attention takes twice as long in bf16 as in fp32.
        query, key, value = query.float(), key.float(), value.float()
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0].to(dtype)


def _is_plain(
    module: nn.Module,
    query: torch.Tensor,
    value: torch.Tensor,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> bool:
    """Whether attention without a mask is causal and nothing besides."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    is_softmax = dropout == 0.0 and position_bias is None and softcap is None
    return causal and is_softmax and query.shape[-1] == value.shape[-1]


@contextmanager
def masks_of_one(spans: list[Span]) -> Iterator[None]:
    """Within it, a model makes its attention mask for the longest of these sequences in place of the whole row.

    The others' are the beginning of it. A row of all sequences of a step would have a mask that is quadratic in them.
    """
    token = _longest.set(max(spans, key=len))
    try:
        yield
    finally:
        _longest.reset(token)


def _mask(batch_size: int, q_length: int, kv_length: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    longest = _longest.get()
    if longest is None:
        return sdpa_mask(batch_size, q_length, kv_length, *args, **kwargs)
    size = len(longest)
    return sdpa_mask(1, size, size, *args, **kwargs | {"q_offset": longest.start, "kv_offset": longest.start})


_longest: ContextVar[Span | None] = ContextVar("_longest", default=None)
_current: ContextVar[tuple[list[Span], Masks] | None] = ContextVar("_current", default=None)
AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)
