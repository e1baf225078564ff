"""Which neurons of a feed-forward layer stay, and an output matrix that makes up for the others.

A feed-forward layer gives a Wᵀ for its neurons' values a. Some of them go; for the others W is fitted anew by ridge
regression on public calibration text, towards what the full model's block gives, so that the fit also corrects what
quantization and the blocks before it lost. The neurons are taken out in a few rounds, each time those whose loss the
others make up for best: the optimal brain surgeon (Hassibi and Stork, 1992) on rows of W instead of single weights.

Every token counts by the inverse square of its state, as in `surrogate`.

Shapes: N tokens, F neurons, K that stay, D hidden.
"""

from __future__ import annotations

import torch

RIDGE = 0.5
_SMALLEST = 1e-9
_ROWS = 1024  # at a time
_ROUND = 4  # of what has to go, this part goes in a round


def indices_name(layer: int) -> str:
    """What the numbers of the neurons that stay in `layer` are called in a package."""
    return f"neurons.{layer}"


class NeuronFit:
    """Sums over calibration tokens, in fp32: A = Σ wₙ aₙᵀ aₙ and C = Σ wₙ aₙᵀ eₙ.

    Args:
        W_FD: the output matrix as it is, which is used up.

    Attributes:
        neurons: F.
    """

    def __init__(self, W_FD: torch.Tensor) -> None:
        self._W_FD, self.neurons = W_FD.float(), len(W_FD)
        self._aa_FF = torch.zeros(self.neurons, self.neurons, device=W_FD.device)
        self._ae_FD = torch.zeros(W_FD.shape, device=W_FD.device)

    def add(self, a_NF: torch.Tensor, e_ND: torch.Tensor, w_N1: torch.Tensor) -> None:
        """Take in the neurons' values, what their output should gain, and how much each token counts."""
        for a, e, w in zip(a_NF.split(_ROWS), e_ND.split(_ROWS), w_N1.split(_ROWS), strict=True):
            a = a.float()
            weighted_FN = (a * w).T
            self._aa_FF.addmm_(weighted_FN, a)
            self._ae_FD.addmm_(weighted_FN, e.float())

    def solve(self, count: int, ridge: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The neurons that stay and their output matrix; the sums are used up.

        V minimizes Σₙ wₙ ‖eₙ + aₙ W − aₙ[kept] V‖² + Σⱼ λⱼ ‖Vⱼ − Wⱼ‖², with λⱼ = `ridge` · Σₙ wₙ aₙⱼ².

        Args:
            count: K.
            ridge: see above.

        Returns:
            Numbers of the neurons that stay, sorted (K,), V (K, D), and Σₙ wₙ aₙᵀ aₙ of those neurons (K, K), in fp32.
        """
        # In units of each neuron's own size all λ are alike, and fp32 is enough.
        size_F1 = self._aa_FF.diagonal().sqrt()[:, None]
        size_F1 = size_F1.clamp_min(_SMALLEST * size_F1.max()).clamp_min(torch.finfo(torch.float32).tiny)
        gram_FF, wanted_FD = self._aa_FF.div_(size_F1).div_(size_F1.T), self._ae_FD.div_(size_F1)
        W_FD = self._W_FD.mul_(size_F1)
        kept_K = torch.arange(len(W_FD), device=W_FD.device)
        if count < len(W_FD):
            inverse_FF = gram_FF.clone()
            inverse_FF.diagonal().add_(ridge)
            # In place: another F × F matrix or two would be what most of a fit's memory goes to.
            torch.linalg.cholesky(inverse_FF, out=inverse_FF)
            torch.cholesky_inverse(inverse_FF, out=inverse_FF)
            kept_K = _survivors(inverse_FF, W_FD.clone(), count)
            del inverse_FF
        # What the others gave is the first part of what those that stay should give besides.
        wanted_KD = (gram_FF @ W_FD)[kept_K] + wanted_FD[kept_K]
        gram_KK = gram_FF[kept_K[:, None], kept_K]
        wanted_KD -= gram_KK @ W_FD[kept_K]
        gram_KK.diagonal().add_(ridge)
        gain_KD = torch.cholesky_solve(wanted_KD, torch.linalg.cholesky(gram_KK))
        gram_KK.diagonal().sub_(ridge)
        size_K1 = size_F1[kept_K]
        return kept_K, (W_FD[kept_K] + gain_KD) / size_K1, gram_KK.mul_(size_K1).mul_(size_K1.T)


def _survivors(inverse_FF: torch.Tensor, W_FD: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` neurons that are left when those that are missed least went; changes its arguments.

    Taking out the neurons G costs tr(W_Gᵀ (H⁻¹_GG)⁻¹ W_G) when the others make up for them by −H⁻¹_FG (H⁻¹_GG)⁻¹ W_G.
    """
    alive_F = torch.ones(len(W_FD), dtype=torch.bool, device=W_FD.device)
    while (excess := int(alive_F.sum()) - count) > 0:
        cost_F = W_FD.square().sum(dim=1) / inverse_FF.diagonal()
        cost_F[~alive_F] = torch.inf
        going_G = cost_F.topk(min(excess, max(32, excess // _ROUND)), largest=False).indices
        towards_FG = torch.linalg.solve(inverse_FF[going_G[:, None], going_G], inverse_FF[:, going_G], left=False)
        W_FD -= towards_FG @ W_FD[going_G]
        inverse_FF.addmm_(towards_FG, inverse_FF[going_G], alpha=-1)
        alive_F[going_G] = False
        W_FD[going_G] = 0
    return alive_F.nonzero().flatten()
