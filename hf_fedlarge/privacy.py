"""Client-level differential privacy: what clipping, noise and chance promise each client (McMahan et al., 1710.06963).

A client's change of the trained factors, all modules as one vector, is clipped to the norm C: by the client, and again
by the server. Gaussian noise of the standard deviation z·C is added to the sum of the cohort's m changes, and the
result divided by m, however many answered:

    next = before + (Σ clipped changes + N(0, (z C)² I)) / m

Two federations are neighbours if they differ in one client, replaced by any other (or by one that doesn't answer, but
for secure aggregation). That moves the sum by up to 2 C, so for the accountant the noise multiplier is z / 2. A cohort
is drawn evenly of N clients without replacement by what nobody can foresee, which amplifies the promise (Wang et al.,
1808.00087) as long as nobody but the server learns whom it drew. With secure aggregation it isn't counted: attempts are
drawn until one has enough clients that are there, who are so more likely to be in it than m of N.

A round that is done again after a kill draws new noise. That spends nothing more: `RoundServer.close` evaluates and
publishes an adapter only after its directory was renamed whole, and from then on takes that one. Noise of an adapter
that was not renamed was seen by nobody. An abandoned round had no updates, and releases nothing.

Left out: noise on integers. A normal number in floating point has values it can't take, from which something may be
told of what it was added to (Mironov 2012, doi 10.1145/2382196.2382264); `normal` makes that hard, not impossible.
`docs/privacy.md` has what is protected from whom, and what is not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import torch

from hf_fedlarge.config import PrivacySettings
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.ledger import Draw, PrivacyEntry
from hf_fedlarge.robust import clip_factors
from hf_fedlarge.tensors import Factors


def normal(shape: Sequence[int], entropy: Callable[[int], bytes] = os.urandom) -> torch.Tensor:
    """Standard normal numbers in fp64, of the operating system's cryptographic randomness.

    Each is half the sum of four, so that nobody can enumerate which values there are (Holohan and Braghin 2021,
    arXiv 2107.10138). One of the four is Φ⁻¹ of 63 bits with a bit for its sign: of the tails 2⁻⁶⁴ is missing.

    Args:
        shape: of the result.
        entropy: gives so many random bytes.
    """
    count = math.prod(shape)
    total = torch.zeros(count, dtype=torch.float64)
    for _ in range(4 if count else 0):
        bits = torch.frombuffer(bytearray(entropy(8 * count)), dtype=torch.int64)
        tail = ((bits & (2**63 - 1)).double() + 0.5) * 2.0**-64
        total += torch.special.ndtri(tail) * torch.where(bits < 0, 1.0, -1.0)
    return (total / 2).reshape(tuple(shape))


def with_noise(before: Factors, trained: str, deviation: float) -> Factors:
    """Factors in fp64 with noise on those that are `trained` (`A`, `B` or `both`); the other one is as it was."""
    return Factors(
        *(
            factor.double() + deviation * normal(factor.shape) if trained in ("both", letter) else factor
            for letter, factor in zip("AB", before, strict=True)
        )
    )


def squared_change(after: Factors, before: Factors) -> torch.Tensor:
    """The squared norm of what changed in both factors of a module; a scalar in fp64."""
    return sum((new.double() - old.double()).square().sum() for new, old in zip(after, before, strict=True))


def clipped(after: dict[str, Factors], before: dict[str, Factors], bound: float) -> dict[str, Factors]:
    """Module → factors whose change, over all modules, is of the norm `bound` at most: what a client sends."""
    total = sum(squared_change(after[module], before[module]) for module in after)
    [factor] = clip_factors(total[None], bound)
    if factor == 1.0:
        return after
    return {
        module: Factors(*(old + factor * (new - old) for new, old in zip(pair, before[module], strict=True)))
        for module, pair in after.items()
    }


def spent(settings: PrivacySettings, draws: list[Draw]) -> PrivacyEntry:
    """What was spent in these rounds, as `dp-accounting` computes it; the smaller of two bounds counts.

    With chance: Rényi differential privacy, which adds up over rounds (Wang et al., theorem 27). Without: R rounds of
    a Gaussian are one of σ / √R, whose epsilon is known exactly (Balle and Wang, 1805.06530). Chance can only help, but
    its bound is loose for large cohorts and little noise.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ImportError as error:
        raise ConfigError("privacy needs dp-accounting; install it with pip install dp-accounting.") from error

    sigma = settings.noise_multiplier / 2  # the sum moves by two clips
    least = 0.0
    if draws:
        rounds = sum(draw.rounds for draw in draws)
        accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
        for draw in draws:
            size = min(draw.cohort, draw.of)
            event = dp_accounting.SampledWithoutReplacementDpEvent(draw.of, size, dp_accounting.GaussianDpEvent(sigma))
            accountant.compose(event, draw.rounds)
        everybody = dp_accounting.get_epsilon_gaussian(sigma / math.sqrt(rounds), settings.delta)
        least = float(min(everybody, accountant.get_epsilon(settings.delta)))
    return PrivacyEntry(**settings.model_dump(), draws=draws, epsilon=least)
