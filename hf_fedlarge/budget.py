"""How much of a forward pass to hold for its backward, and how much to compute at a time, with a budget or without."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_fedlarge.errors import ConfigError

# Products of this many tokens run at their full rate; without a budget no more than these are computed together.
FULL_RATE_TOKENS = 512
# What is kept of a forward pass without a budget: little beside what a process takes anyway.
UNASKED_BYTES = 64 * 2**20
# A block's backward holds its graph and, beside it, gradients: of a gated layer's gate, branch and product at a time,
# which is nearly as much as the graph.
WORKING = 2.0
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str | int) -> int:
    """`2GiB`, `1500MB` or `1.5G` as bytes.

    Raises:
        ConfigError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", str(text), re.IGNORECASE)
    if not match:
        raise ConfigError(f"The budget {text!r} can't be read; expected a size such as 2GiB or 1500MB.")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


@dataclass(frozen=True)
class Plan:
    """What a training step holds.

    Attributes:
        group_tokens: how many tokens a block computes at a time, where sequences are not longer.
        kept: of how many (block, group) pairs the graph of the forward pass is kept for the backward, counted from the
            last group of the last block on.
    """

    group_tokens: int
    kept: int


def plan_activations(
    lengths: list[int],
    blocks: int,
    micro_batch_size: int | None,
    available: int | None = None,
    token_bytes: float = 0.0,
    boundary_bytes: float = 0.0,
    cast_bytes: float = 0.0,
) -> Plan:
    """Plan one batch.

    Args:
        lengths: of its sequences, in tokens.
        blocks: how many decoder blocks' inputs are held.
        micro_batch_size: sequences computed at a time at least, without a budget; None: all.
        available: bytes that activations may take; None: no budget was set, and little is held.
        token_bytes: what one block's graph holds for a token.
        boundary_bytes: what a token's hidden state takes between two blocks.
        cast_bytes: what a token takes of the buffers for products of another dtype.

    Raises:
        ConfigError: not even one sequence at a time fits.
    """
    longest, total = max(lengths), sum(lengths)
    if available is None:
        at_once = total if micro_batch_size is None else max(FULL_RATE_TOKENS, micro_batch_size * longest)
        # The last block's last group is the first to be differentiated: what it holds would be made again at once.
        kept = int(UNASKED_BYTES / (token_bytes * min(at_once, total))) if token_bytes else 1
        return Plan(group_tokens=at_once, kept=max(1, kept))
    # The hidden states between the blocks, and their gradient.
    rest = available - boundary_bytes * total * (blocks + 2)
    working_bytes = WORKING * token_bytes + cast_bytes
    if rest < working_bytes * longest:
        needed = working_bytes * longest + boundary_bytes * total * (blocks + 2)
        raise ConfigError(
            f"The memory budget leaves {max(available, 0) / 1e6:.0f} MB for activations, but a batch of {total} tokens "
            f"takes {needed / 1e6:.0f} MB: raise --memory_budget, or lower --max_length or the batch (for evaluation "
            "--per_device_eval_batch_size)."
        )
    # One group in work; what is left after it is kept, so a group takes no more than a third.
    group = min(total, max(longest, FULL_RATE_TOKENS, int(rest / 3 / working_bytes)))
    group = max(longest, min(group, int(rest / working_bytes)))
    kept = int((rest - working_bytes * group) / (token_bytes * group))
    return Plan(group_tokens=group, kept=max(0, min(kept, blocks * -(-total // group))))
