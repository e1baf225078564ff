"""How a client of a federation is started: in this process, or by `accelerate launch` in one of its own.

Both give the same update. In this process hundreds of clients share one loaded package (`worker.py`); a process of its
own costs some seconds a client and gives its memory back at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from transformers import HfArgumentParser

from hf_fedlarge.errors import ConfigError, FedLargeError
from hf_fedlarge.jobs import ClientJob, Train
from hf_fedlarge.records import nearest
from hf_fedlarge.trainers.client import ClientArguments, train_client
from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig
from hf_fedlarge.trainers.worker import Worker


class ClientFailedError(FedLargeError, RuntimeError):
    """A client's process ended with an error."""


def check_training(training: dict[str, Any]) -> None:
    """Check a federation's `training` before a client is started with it; nothing is written.

    Raises:
        ConfigError: an argument that is unknown, has no value, or has one that trl or transformers refuses.
    """
    training_config(training)


def in_process() -> Train:
    """What trains a run's clients in this process, one after another on the same loaded package."""
    worker = Worker()

    def train(job: ClientJob) -> None:
        train_client(ClientArguments(**_arguments(job)), training_config(job.training), worker)

    return train


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
    command += _as_words(_arguments(job) | job.training)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    # A process that a killed server left behind may have finished the update while this one waited for it.
    if result.returncode and not job.output.exists():
        lines = [line for line in result.stderr.splitlines() if line.startswith("hf-fedlarge train: ")]
        last = lines[-1] if lines else (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ClientFailedError(f"{job.client}'s process ended with {result.returncode}: {last}")


# Each is called once for a run.
LAUNCHERS: dict[str, Callable[[], Train]] = {
    "inprocess": in_process,
    "accelerate": lambda: train_by_accelerate,
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
        "proximal": job.proximal,
        "eval_examples": job.eval_examples,
        "codec": job.codec.name,
        "topk_share": job.codec.topk_share,
        "state": str(job.state) if job.state else None,
        "key": str(job.key) if job.key else None,
        # The server checked the package when it made it or took up the run.
        "verify": False,
    }


def training_config(training: dict[str, Any]) -> StreamingLoraConfig:
    """Parsed as words of a command line, so that `1e-4`, a string in YAML, means the same to every launcher.

    Raises:
        ConfigError: as `check_training`.
    """
    clients_own = {"output_dir", "resume_from_checkpoint"}
    known = {field.name for field in fields(StreamingLoraConfig)} - clients_own
    for name in sorted(training.keys() - known):
        expected = nearest(name, known) or "those of trl's SFTConfig other than output_dir and resume_from_checkpoint"
        raise ConfigError(
            f"The federation's training arguments are wrong: {name} found, expected {expected}; correct or remove it."
        )
    for name, value in training.items():
        if value is None:
            raise ConfigError(
                f"The federation's training arguments are wrong: {name} is null, which no command line can pass on; "
                "remove it or give it a value."
            )
    parser = HfArgumentParser(StreamingLoraConfig, allow_abbrev=False, exit_on_error=False)
    # The client program puts its own directory there.
    words = _as_words({"output_dir": "unused"} | training)
    try:
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)[0]
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"The federation's training arguments are wrong: {error}") from error


def _as_words(arguments: dict[str, Any]) -> list[str]:
    words = []
    for name, value in arguments.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words
