"""The server's optimizers: the aggregate's change as a gradient (Reddi et al. 2020, arXiv 2003.00295).

Adam, Yogi and Adagrad scale every coordinate by its own history, so they need coordinates that mean the same in every
round: those of averaged factors do, those of an SVD of a product don't (any rotation between B and A gives the same
product). Momentum is linear and works on products as well; there it is a sum of products of bounded rank.
No bias is corrected, as in the paper. All in fp64; what is stored between rounds is fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Rates(NamedTuple):
    """The learning rate, the decays of both averages, and what is added to the root (the paper's tau)."""

    lr: float
    beta1: float
    beta2: float
    eps: float


State = tuple[torch.Tensor, torch.Tensor]
"""The average of changes m, and of their squares v; of the shape of what is changed, zero at first."""


def momentum(change: torch.Tensor, state: State, rates: Rates) -> tuple[torch.Tensor, State]:
    """m ← β1 m + change; the step is lr · m (FedAvgM, Hsu et al. 2019, arXiv 1909.06335)."""
    m, v = state
    m = rates.beta1 * m + change
    return rates.lr * m, (m, v)


def adam(change: torch.Tensor, state: State, rates: Rates) -> tuple[torch.Tensor, State]:
    """v ← β2 v + (1 − β2) change²."""
    return _adaptive(change, state, rates, rates.beta2 * state[1] + (1 - rates.beta2) * change.square())


def yogi(change: torch.Tensor, state: State, rates: Rates) -> tuple[torch.Tensor, State]:
    """v ← v − (1 − β2) change² sign(v − change²): v grows as fast as Adam's, and falls slower."""
    square = change.square()
    return _adaptive(change, state, rates, state[1] - (1 - rates.beta2) * square * (state[1] - square).sign())


def adagrad(change: torch.Tensor, state: State, rates: Rates) -> tuple[torch.Tensor, State]:
    """v ← v + change², so steps only become smaller."""
    return _adaptive(change, state, rates, state[1] + change.square())


def _adaptive(change: torch.Tensor, state: State, rates: Rates, v: torch.Tensor) -> tuple[torch.Tensor, State]:
    """m ← β1 m + (1 − β1) change; the step is lr · m / (√v + eps)."""
    m = rates.beta1 * state[0] + (1 - rates.beta1) * change
    return rates.lr * m / (v.sqrt() + rates.eps), (m, v)


OPTIMIZERS: dict[str, Callable[[torch.Tensor, State, Rates], tuple[torch.Tensor, State]]] = {
    "momentum": momentum,
    "adam": adam,
    "yogi": yogi,
    "adagrad": adagrad,
}
