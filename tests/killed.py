"""A federation that kills itself before or after its n-th step, for tests of what is left."""

import os
import signal
from pathlib import Path

import torch

from hf_fedlarge import clients, rounds, server
from hf_fedlarge.config import load_federation
from hf_fedlarge.journal import Journal
from hf_fedlarge.trainers.launch import LAUNCHERS

STEPS = {
    rounds: ("write_json", "make_tier_package", "start_adapter", "aggregate_updates", "merge"),
    clients: ("check_in",),
    server: ("write_json", "commit_directory"),
}


def dying(step: int):
    """A wrapper of functions; the process dies by SIGKILL at the `step`-th beginning or end of a call of one."""
    torch.set_num_threads(1)
    return stopping(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stopping(step: int, stop):
    """A wrapper of functions; `stop` is called at the `step`-th beginning or end of a call of one."""
    left = step

    def count():
        nonlocal left
        left -= 1
        if left == 0:
            stop()

    def counted(function):
        def wrapper(*arguments, **options):
            count()
            result = function(*arguments, **options)
            count()
            return result

        return wrapper

    return counted


def run_until(federation: Path, output: Path, step: int) -> None:
    """Run, and die by SIGKILL at the `step`-th beginning or end of a step; end in peace if there are fewer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    counted = dying(step)
    for module, names in STEPS.items():
        for name in names:
            setattr(module, name, counted(getattr(module, name)))
    Journal.write = counted(Journal.write)
    rounds.run_federation(load_federation(federation), output, counted(LAUNCHERS["inprocess"]()))
