"""Train LoRA adapters on a package with a client's own data, and write an update.

    # without a GPU: accelerate launch --cpu --num_processes 1, or it leaves the program one thread
    accelerate launch trainers/client.py --package PACKAGE --data DATA.jsonl --output UPDATE
    accelerate launch -m hf_fedlarge.trainers.client --package PACKAGE --data DATA.jsonl --output UPDATE
    hf-fedlarge train --package PACKAGE --data DATA.jsonl --output UPDATE

    # from the federation's current adapter, as client `lab-3` of round 2, 50 steps of 2 x 4 sequences, packed
    hf-fedlarge train --package PACKAGE --adapter ADAPTER --data DATA.jsonl --output UPDATE --client lab-3 --round 2 \\
        --max_steps 50 --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --packing

DATA is a .jsonl, .csv or .parquet file or a data set of the Hub with `messages`, `prompt` and `completion`, or `text`.
Any argument of trl's SFTConfig may follow but `output_dir` and `resume_from_checkpoint`: interrupted training resumes
when the same command is given again. `--eval_strategy steps` evaluates the held-out examples while training, too, and
`--report_to tensorboard` logs to UPDATE.logs unless TENSORBOARD_LOGGING_DIR says where.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from hf_fedlarge.errors import ConfigError, FedLargeError, os_problem

if TYPE_CHECKING:
    from hf_fedlarge.artifacts import UpdateManifest
    from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig
    from hf_fedlarge.trainers.training import Look
    from hf_fedlarge.trainers.worker import Worker


@dataclass
class ClientArguments:
    """What the client program takes besides SFTConfig's arguments."""

    package: str = field(metadata={"help": "The package directory, made by `hf-fedlarge shrink`."})
    data: str = field(metadata={"help": "Training examples: a file, or a data set of the Hub."})
    output: str = field(metadata={"help": "The update directory to make."})
    adapter: str | None = field(default=None, metadata={"help": "The federation's adapter to start from."})
    eval_data: str | None = field(default=None, metadata={"help": "Held-out examples; else a share of --data."})
    held_out: float = field(default=0.1, metadata={"help": "Share of --data held out where --eval_data is not given."})
    eval_examples: int = field(default=64, metadata={"help": "Examples to hold out and evaluate at most; 0: none."})
    client: str = field(default="client", metadata={"help": "This client's name."})
    round: int = field(default=1, metadata={"help": "The round this update is for."})
    proximal: float = field(default=0.0, metadata={"help": "FedProx's mu: what leaving the round's adapter costs."})
    lora_rank: int = field(default=16, metadata={"help": "Rank; the adapter's, where --adapter is given."})
    lora_alpha: float = field(default=32.0, metadata={"help": "Alpha; likewise."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' input; likewise."})
    rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(rank); likewise."})
    lora_targets: list[str] | None = field(default=None, metadata={"help": "Matrices with adapters; default: all."})
    codec: str = field(default="fp32", metadata={"help": "How the update is encoded: fp32, bf16, int8, nf4, topk."})
    topk_share: float = field(default=0.05, metadata={"help": "Share of a factor's entries that topk sends."})
    state: str | None = field(
        default=None, metadata={"help": "This client's directory for what the codec loses; else it is forgotten."}
    )
    key: str | None = field(default=None, metadata={"help": "Sign the update with this key of `hf-fedlarge keys new`."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an update that is there already."})
    verify: bool = field(default=True, metadata={"help": "Check the package's digests before loading it."})


def _one_at_a_time(train: Callable[..., UpdateManifest]) -> Callable[..., UpdateManifest]:
    """Make a second process that is to write the same update wait for the first.

    A server that was killed may have left a client's process behind, and starts that client again.
    """

    @wraps(train)
    def alone(client: ClientArguments, config: StreamingLoraConfig, *how: Any, **named: Any) -> UpdateManifest:
        output = Path(client.output)
        if config.process_index != 0 or not output.parent.is_dir():
            return train(client, config, *how, **named)
        lock = output.with_name(f".{output.name}.lock")
        with FileLock(lock):
            try:
                return train(client, config, *how, **named)
            finally:
                lock.unlink(missing_ok=True)

    return alone


@_one_at_a_time
def train_client(
    client: ClientArguments,
    config: StreamingLoraConfig,
    worker: Worker | None = None,
    look: Look | None = None,
) -> UpdateManifest:
    """Train and write the update directory; on a process that is not the first, train along and write nothing.

    Args:
        client: what to train on what.
        config: how to train; its output directory is replaced by one beside the update.
        worker: keeps the loaded package from one client to the next; None: it is loaded for this one. The update is
            the same.
        look: called before the first step with the Trainer, which has the examples as tokens; None: nobody looks.

    Returns:
        The update's manifest. `measured` has the `steps` and `seconds` of this training, of which `train_seconds` went
        into steps, `evaluation_seconds` into held-out losses and `overhead_seconds` into all else but the writing, and
        the `peak_memory_bytes` of the process: where one trains several clients, or is the server, that of all it did
        so far.

    Raises:
        FedLargeError: bad input, in one sentence; nothing is written.
        OSError: the work directory beside the update, which holds the checkpoints, can't be written.
    """
    from hf_fedlarge.trainers.training import train  # here, so that `--help` and argument errors come at once

    return train(client, config, worker, look)


def parse_arguments(arguments: list[str] | None = None) -> tuple[ClientArguments, Any]:
    """The command line as the client's arguments and a `StreamingLoraConfig`.

    Raises:
        ConfigError: a training argument has a value that trl or transformers refuses, or is the client's own.
    """
    from transformers import HfArgumentParser

    from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig

    parser = HfArgumentParser((ClientArguments, StreamingLoraConfig), prog="hf-fedlarge train", allow_abbrev=False)
    parser.description = "Train LoRA adapters on a package with a client's own data, and write an update."
    parser.set_defaults(output_dir="")
    try:
        client, config = parser.parse_args_into_dataclasses(arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The training arguments are wrong: {error}") from error
    if config.output_dir:
        raise ConfigError(
            f"--output_dir {config.output_dir} can't be used; leave it out: checkpoints lie beside the update, which "
            "--output names, until it is whole."
        )
    return client, config


def main(arguments: list[str] | None = None) -> int:
    """Run the program; bad input gets one sentence and the exit code 2."""
    try:
        client, config = parse_arguments(arguments)
        if config.process_index == 0:
            from hf_fedlarge.processor import describe_device

            print(describe_device(config.device), flush=True)
        train_client(client, config)
    except FedLargeError as error:
        print(f"hf-fedlarge train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nhf-fedlarge train: Interrupted; the same command goes on from a checkpoint, if any.", file=sys.stderr)
        return 130
    except OSError as error:
        if (reason := os_problem(error)) is None:
            raise
        print(f"hf-fedlarge train: {error.filename or client.output} can't be written: {reason}.", file=sys.stderr)
        return 2
    if config.process_index == 0:
        from hf_fedlarge.update import outcome

        print(f"{client.output}: {outcome(Path(client.output))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
