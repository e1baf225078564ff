"""What a federation has spent of its clients' privacy, as its adapter's manifest says it: settings, draws and epsilon.

The draws are a list of what was done and epsilon is what follows from it (`privacy.py`), so that whoever has the
manifest can compute it anew. No client is named.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hf_fedlarge.config import PrivacySettings, Record


class Draw(Record):
    """A cohort drawn of so many clients, in so many rounds that were aggregated."""

    cohort: Annotated[int, Field(ge=1)]
    of: Annotated[int, Field(ge=1)]
    rounds: Annotated[int, Field(ge=1)] = 1


class PrivacyEntry(PrivacySettings):
    """The settings and what was spent under them up to and with this adapter: (`epsilon`, `delta`)."""

    draws: list[Draw] = []
    epsilon: Annotated[float, Field(ge=0)] = 0.0

    @property
    def settings(self) -> PrivacySettings:
        """The settings alone."""
        return PrivacySettings(clip=self.clip, noise_multiplier=self.noise_multiplier, delta=self.delta)

    @property
    def sentence(self) -> str:
        """As it is reported."""
        return f"ε = {self.epsilon:.3g} at δ = {self.delta:g}"


def drawn_again(draws: list[Draw], draw: Draw) -> list[Draw]:
    """The draws with one more, those alike counted together."""
    same = [other for other in draws if (other.cohort, other.of) == (draw.cohort, draw.of)]
    rounds = draw.rounds + sum(other.rounds for other in same)
    more = [other for other in draws if other not in same] + [draw.model_copy(update={"rounds": rounds})]
    return sorted(more, key=lambda other: (other.of, other.cohort))
