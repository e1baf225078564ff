"""The client's side of SCAFFOLD while it trains; `hf_fedlarge/scaffold.py` says what it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

_SUMS = "control_sums.safetensors"


class Corrected(TrainerCallback):
    """Sums the gradients that the optimizer would get, and gives it corrected ones; also across checkpoints.

    Args:
        corrections: each adapter parameter with c − cᵢ; those that aren't trained are left out.
    """

    def __init__(self, corrections: Iterable[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
        trained = [(parameter, values) for parameter, values in corrections if parameter.requires_grad]
        self._corrections = [(parameter, values.to(parameter)) for parameter, values in trained]
        self._sums = {parameter: torch.zeros_like(parameter, requires_grad=False) for parameter, _ in trained}
        self._steps = 0

    def mean(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The mean gradient of all steps; zero of what isn't trained."""
        total = self._sums.get(parameter)
        return torch.zeros_like(parameter, requires_grad=False) if total is None else total / max(self._steps, 1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from the checkpoint's sums, where there is one."""
        self._steps = state.global_step
        if self._steps:
            saved = load_file(_checkpoint(args, state) / _SUMS)
            for number, total in enumerate(self._sums.values()):
                total.copy_(saved[str(number)])

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Add up g, and make it g − cᵢ + c."""
        self._steps += 1
        for parameter, correction in self._corrections:
            self._sums[parameter].add_(parameter.grad)
            parameter.grad.add_(correction)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the sums before the rest of a checkpoint, whose last file then says that all is there."""
        if control.should_save and state.is_world_process_zero:
            directory = _checkpoint(args, state)
            directory.mkdir(parents=True, exist_ok=True)
            save_file({str(number): total for number, total in enumerate(self._sums.values())}, directory / _SUMS)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
