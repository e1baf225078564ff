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

from hf_fedlarge.quantize import BLOCK

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

    def add(self, a_NF: torch.Tensor, e_ND: torch.Tensor | None, w_N1: torch.Tensor) -> None:
        """Take in the neurons' values, what their output should gain (None: nothing), and what each token counts."""
        for start in range(0, len(a_NF), _ROWS):
            rows = slice(start, start + _ROWS)
            a = a_NF[rows].float()
            weighted_FN = (a * w_N1[rows]).T
            self._aa_FF.addmm_(weighted_FN, a)
            if e_ND is not None:
                self._ae_FD.addmm_(weighted_FN, e_ND[rows].float())

    def costs(self, ridge: float = RIDGE) -> list[float]:
        """What it costs as neurons go until each multiple of 64 is left, down to 64; the sums are used up.

        It is (V − W)ᵀ (A + λ) (V − W) that rises, with V zero for neurons that went and least squares for the others:
        the error on the text, and the one that values have beyond it that vary each by itself, by `ridge` of their
        squares.

        Args:
            ridge: see `solve`.
        """
        self._in_own_size()
        elimination = _Elimination(self._aa_FF, self._W_FD, ridge)
        counts = range((self.neurons - 1) // BLOCK * BLOCK, 0, -BLOCK)
        return [elimination.take_out(elimination.left - count) for count in counts]

    def solve(self, count: int, ridge: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The neurons that stay and their output matrix; the sums are used up.

        V minimizes Σₙ wₙ ‖eₙ + aₙ W − aₙ[kept] V‖² + Σⱼ λⱼ ‖Vⱼ − Wⱼ‖², with λⱼ = `ridge` · Σₙ wₙ aₙⱼ².

        Args:
            count: K.
            ridge: see above.

        Returns:
            Numbers of the neurons that stay, sorted (K,), V (K, D), and Σₙ wₙ aₙᵀ aₙ of those neurons (K, K), in fp32.
        """
        size_F1 = self._in_own_size()
        gram_FF, wanted_FD, W_FD = self._aa_FF, self._ae_FD.div_(size_F1), self._W_FD
        del self._aa_FF
        kept_K = torch.arange(len(W_FD), device=W_FD.device)
        if count < len(W_FD):
            elimination = _Elimination(gram_FF.clone(), W_FD.clone(), ridge)
            while (excess := elimination.left - count) > 0:
                elimination.take_out(min(excess, max(32, excess // _ROUND)))
            kept_K = elimination.alive_F.nonzero().flatten()
            del elimination
        # What the others gave is the first part of what those that stay should give besides.
        wanted_KD = (gram_FF @ W_FD)[kept_K] + wanted_FD[kept_K]
        gram_KK = gram_FF[kept_K[:, None], kept_K]
        del gram_FF  # solving takes two more matrices of its size
        wanted_KD -= gram_KK @ W_FD[kept_K]
        gram_KK.diagonal().add_(ridge)
        gain_KD = torch.cholesky_solve(wanted_KD, torch.linalg.cholesky(gram_KK))
        gram_KK.diagonal().sub_(ridge)
        size_K1 = size_F1[kept_K]
        return kept_K, (W_FD[kept_K] + gain_KD) / size_K1, gram_KK.mul_(size_K1).mul_(size_K1.T)

    def _in_own_size(self) -> torch.Tensor:
        """Bring the sums' A and W in units of each neuron's own size (F, 1): all λ are alike, and fp32 is enough."""
        size_F1 = self._aa_FF.diagonal().sqrt()[:, None]
        size_F1 = size_F1.clamp_min(_SMALLEST * size_F1.max()).clamp_min(torch.finfo(torch.float32).tiny)
        self._aa_FF.div_(size_F1).div_(size_F1.T)
        self._W_FD.mul_(size_F1)
        return size_F1


class _Elimination:
    """Takes neurons out, those that are missed least first.

    Taking out the neurons G costs tr(W_Gᵀ (H⁻¹_GG)⁻¹ W_G) when the others make up for them by −H⁻¹_FG (H⁻¹_GG)⁻¹ W_G.

    Args:
        gram_FF: H without the ridge; it is used up, as `W_FD` is.
        W_FD: the output matrix.
        ridge: see `NeuronFit.solve`.

    Attributes:
        alive_F: which are there still.
        left: how many.
    """

    def __init__(self, gram_FF: torch.Tensor, W_FD: torch.Tensor, ridge: float) -> None:
        gram_FF.diagonal().add_(ridge)
        # In place: another F × F matrix or two would be what most of a fit's memory goes to.
        torch.linalg.cholesky(gram_FF, out=gram_FF)
        torch.cholesky_inverse(gram_FF, out=gram_FF)
        self._inverse_FF, self._W_FD = gram_FF, W_FD
        self.alive_F = torch.ones(len(W_FD), dtype=torch.bool, device=W_FD.device)
        self.left = len(W_FD)

    def take_out(self, count: int) -> float:
        """Take `count` neurons out; what that costs."""
        inverse_FF, W_FD = self._inverse_FF, self._W_FD
        cost_F = W_FD.square().sum(dim=1) / inverse_FF.diagonal()
        cost_F[~self.alive_F] = torch.inf
        going_G = cost_F.topk(count, largest=False).indices
        inverse_FG, missing_GD = inverse_FF[:, going_G], W_FD[going_G]
        solver = torch.linalg.lu_factor(inverse_FG[going_G])
        rise_GD = torch.linalg.lu_solve(*solver, missing_GD)
        W_FD.addmm_(inverse_FG, rise_GD, alpha=-1)
        inverse_FF.addmm_(torch.linalg.lu_solve(*solver, inverse_FG, left=False), inverse_FF[going_G], alpha=-1)
        self.alive_F[going_G] = False
        W_FD[going_G] = 0
        self.left -= count
        return float((rise_GD * missing_GD).sum())
