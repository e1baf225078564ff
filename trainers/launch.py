"""How a client of a federation is started: in this process, or by `accelerate launch` in one of its own.

Both give the same update. A process of its own costs some seconds a client and gives its memory back at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from hf_fedlarge.trainers.client import ClientArguments, train_client
from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig

from hf_fedlarge.errors import ConfigError, FedLargeError
from hf_fedlarge.rounds import ClientJob


class ClientFailedError(FedLargeError, RuntimeError):
    """A client's process ended with an error."""


def train_in_process(job: ClientJob) -> None:
    """Train a client in this process."""
    try:
        config = StreamingLoraConfig(output_dir=str(job.output), **job.training)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The federation's training arguments are wrong: {error}") from error
    train_client(ClientArguments(**_arguments(job)), config)


def train_by_accelerate(job: ClientJob) -> None:
    """Train a client by `accelerate launch` of the client program.

    Raises:
        ClientFailedError: it ended with an error; the message is the last line that it wrote.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no"]
    # accelerate would leave a process on the CPU a single thread.
    command += [f"--num_cpu_threads_per_process={torch.get_num_threads()}"]
    command += [] if torch.cuda.is_available() else ["--cpu"]
    command += ["-m", "hf_fedlarge.trainers.client"]
    for name, value in (_arguments(job) | job.training).items():
        if value is not None:
            command += [f"--{name}", *_as_words(value)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith("hf-fedlarge train: ")]
        last = lines[-1] if lines else (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ClientFailedError(f"{job.client}'s process ended with {result.returncode}: {last}")


LAUNCHERS: dict[str, Callable[[ClientJob], None]] = {
    "inprocess": train_in_process,
    "accelerate": train_by_accelerate,
}


def _arguments(job: ClientJob) -> dict[str, Any]:
    return {
        "package": str(job.package),
        "adapter": str(job.adapter),
        "data": str(job.data),
        "eval_data": str(job.eval_data) if job.eval_data else None,
        "output": str(job.output),
        "client": job.client,
        "round": job.round,
        # The server checked the package when it made it or took up the run.
        "verify": False,
    }


def _as_words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]
