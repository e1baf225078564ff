"""Train LoRA adapters on a package with a client's own data, and write an update.

    accelerate launch --cpu trainers/client.py --package PACKAGE --data DATA.jsonl --output UPDATE    # --cpu: no GPU
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

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from hf_fedlarge.errors import ConfigError, DataError, FedLargeError, os_problem
from hf_fedlarge.memory import peak_memory_bytes

if TYPE_CHECKING:
    from hf_fedlarge.artifacts import UpdateManifest
    from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig
    from hf_fedlarge.trainers.worker import Worker

logger = logging.getLogger(__name__)


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
    def alone(client: ClientArguments, config: StreamingLoraConfig, worker: Worker | None = None) -> UpdateManifest:
        output = Path(client.output)
        if config.process_index != 0 or not output.parent.is_dir():
            return train(client, config, worker)
        lock = output.with_name(f".{output.name}.lock")
        with FileLock(lock):
            try:
                return train(client, config, worker)
            finally:
                lock.unlink(missing_ok=True)

    return alone


@_one_at_a_time
def train_client(client: ClientArguments, config: StreamingLoraConfig, worker: Worker | None = None) -> UpdateManifest:
    """Train and write the update directory; on a process that is not the first, train along and write nothing.

    Args:
        client: what to train on what.
        config: how to train; its output directory is replaced by one beside the update.
        worker: keeps the loaded package from one client to the next; None: it is loaded for this one. The update is
            the same.

    Returns:
        The update's manifest. `measured` has the `steps` and `seconds` of this training, of which `train_seconds` went
        into steps, `evaluation_seconds` into held-out losses and `overhead_seconds` into all else but the writing, and
        the `peak_memory_bytes` of the process: where one trains several clients, or is the server, that of all it did
        so far.

    Raises:
        FedLargeError: bad input, in one sentence; nothing is written.
        OSError: the work directory beside the update, which holds the checkpoints, can't be written.
    """
    # Here, so that `--help` and argument errors come at once.
    import torch
    from jinja2 import TemplateError
    from pydantic import ValidationError
    from transformers.integrations import TensorBoardCallback

    from hf_fedlarge.adapters import AdapterReader, expected_shapes, get_factors, initial_factors, parameter_values
    from hf_fedlarge.architectures import describe
    from hf_fedlarge.artifacts import (
        CONTROL_WEIGHTS,
        AdapterManifest,
        PackageManifest,
        UpdateManifest,
        check_output,
        read_manifest,
    )
    from hf_fedlarge.config import LoraSettings, first_problem, make_codec
    from hf_fedlarge.data import digest_of, load_examples, training_columns
    from hf_fedlarge.evaluation import evaluate_model
    from hf_fedlarge.feedback import read_lost, with_lost
    from hf_fedlarge.keys import read_key
    from hf_fedlarge.package import package_architecture, package_config
    from hf_fedlarge.partition import hold_out
    from hf_fedlarge.privacy import clipped
    from hf_fedlarge.scaffold import difference, read_common, read_own, write_own
    from hf_fedlarge.templates import check_rendering
    from hf_fedlarge.trainers.resume import prepare_work
    from hf_fedlarge.trainers.scaffold import Corrected
    from hf_fedlarge.trainers.streaming_trainer import StreamingLoraTrainer
    from hf_fedlarge.trainers.worker import Steps, Worker
    from hf_fedlarge.update import write_update
    from hf_fedlarge.wire import Wire

    started = time.monotonic()
    if config.resume_from_checkpoint is not None:
        raise ConfigError(
            "--resume_from_checkpoint can't be used; leave it out: training that was interrupted resumes when the same "
            "command is given again, and --adapter says where to start from."
        )
    if not 0 <= client.proximal < float("inf"):
        raise ConfigError(f"--proximal {client.proximal} is out of range; expected 0 or more.")
    worker = worker or Worker()
    package_dir, output = Path(client.package), Path(client.output)
    check_output(output, client.overwrite)
    key = read_key(Path(client.key)) if client.key else None
    package = read_manifest(package_dir, PackageManifest)
    parent = None
    if client.adapter:
        parent = read_manifest(Path(client.adapter), AdapterManifest)
        if parent.package != package.digest:
            raise ConfigError(
                f"--adapter {client.adapter} belongs to the package {parent.package[:12]}…, but --package is "
                f"{package.digest[:12]}…; give the two that belong together."
            )
    try:
        lora = (
            parent.lora
            if parent
            else LoraSettings(
                rank=client.lora_rank,
                alpha=client.lora_alpha,
                rslora=client.rslora,
                dropout=client.lora_dropout,
                targets=client.lora_targets,
            )
        )
        fresh = UpdateManifest(
            client=client.client,
            round=client.round,
            package=package.digest,
            adapter=parent.digest if parent else None,
            lora=lora,
            codec=make_codec(client.codec, client.topk_share),
            examples=0,
            tokens=0,
            files={},
        )
    except ValidationError as error:
        raise ConfigError(f"The client's arguments are wrong: {first_problem(error)}.") from error
    if fresh.codec.name != "fp32" and not parent:
        raise ConfigError(
            f"--codec {client.codec} encodes what changed since --adapter; give one, or leave it at fp32."
        )

    scaffold = parent is not None and CONTROL_WEIGHTS in parent.files
    if scaffold and not client.state:
        raise ConfigError(
            "This federation corrects its clients' steps (scaffold), for which each keeps a file from round to round; "
            "give --state, a directory of this client's own."
        )

    data = load_examples(client.data)
    if client.eval_data:
        held_out = load_examples(client.eval_data)
    else:
        data, held_out = hold_out(data, client.held_out, seed=0, at_most=client.eval_examples)
    if held_out is not None:
        held_out = held_out.select(range(min(client.eval_examples, len(held_out))))
    evaluates = config.eval_strategy != "no"
    if evaluates and not held_out:
        raise ConfigError(
            f"--eval_strategy {config.eval_strategy.value} has no held-out examples to evaluate; give --eval_data, or "
            "--held_out and --eval_examples above 0."
        )

    work = output.with_name(f".{output.name}.work")
    config.output_dir = str(work)
    state = {"client": asdict(client), "package": package.digest, "adapter": fresh.adapter, "config": config.to_dict()}
    state["examples"] = [None if rows is None else digest_of(rows) for rows in (data, held_out)]
    state["memory_budget"] = state["config"].pop("memory_budget")
    checkpoint = prepare_work(work, json.loads(json.dumps(state, default=str)), config)

    layers = package.kept_layers
    if parent:
        factors = worker.read(Path(client.adapter), parent)
    else:
        factors = initial_factors(describe(package_config(package_dir)), layers, lora, config.seed)
    trains = parent.trains if parent else "both"
    evaluation_seconds = 0.0
    wire, lost = None, {}
    if fresh.codec.name != "fp32":
        reader = AdapterReader(Path(client.adapter))
        wire = Wire(fresh.codec, reader, package_architecture(package_dir, package), layers, lora)
        lost = read_lost(Path(client.state), package.digest, client.round, wire) if client.state else {}
    if scaffold:
        shapes = expected_shapes(package_architecture(package_dir, package), layers, lora)
        own = read_own(Path(client.state), package.digest, client.round, shapes)
        correction = difference(read_common(Path(client.adapter), list(shapes)), own)

    def held_out_loss() -> float | None:
        nonlocal evaluation_seconds
        if not held_out or not trainer.is_world_process_zero():
            return None
        began = time.monotonic()
        try:
            return evaluate_model(
                opened.model,
                opened.tokenizer,
                held_out,
                max_length=config.max_length or 2**20,
                batch_size=config.per_device_eval_batch_size,
                assistant_only=config.assistant_only_loss,
            ).loss
        except DataError as error:
            logger.warning("No held-out loss: %s", error)
            return None
        finally:
            evaluation_seconds += time.monotonic() - began

    with worker.lend(
        package_dir,
        package,
        lora,
        with_lost(factors, lost),
        trains=trains,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
        device=config.device,
        verify=client.verify,
    ) as opened:
        check_rendering(opened.tokenizer.chat_template, data, opened.tokenizer.special_tokens_map)
        steps, corrected = Steps(), None
        if scaffold:
            corrected = Corrected(parameter_values(opened.model, correction, opened.architecture, layers))
        try:
            trainer = StreamingLoraTrainer(
                opened.model,
                config,
                train_dataset=training_columns(data),
                eval_dataset=training_columns(held_out) if evaluates else None,
                processing_class=opened.tokenizer,
                callbacks=[steps, corrected] if corrected else [steps],
                proximal=client.proximal,
            )
        except ConfigError:
            raise
        except (ValueError, RuntimeError, ArithmeticError, TemplateError) as error:  # a chat template is a program
            raise DataError(f"{client.data} can't be trained on: {error}") from error
        if len(trainer.train_dataset) == 0:
            raise DataError(f"{client.data} has no example with a labelled token within {config.max_length} tokens.")
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(output.with_name(f"{output.name}.logs"))  # `work` is removed at the end
        before = held_out_loss()
        trainer.train(resume_from_checkpoint=checkpoint)
        after = held_out_loss()
        trained = get_factors(opened.model, opened.architecture, layers)
        if corrected:
            mean = get_factors(opened.model, opened.architecture, layers, of=corrected.mean)
    seconds = time.monotonic() - started
    manifest = fresh.model_copy(
        update={
            "examples": trainer.labelled_examples,
            "tokens": int(trainer.state.num_input_tokens_seen),
            "loss_before": before,
            "loss_after": after,
            "measured": {
                "seconds": round(seconds, 3),
                "train_seconds": round(steps.seconds, 3),
                "evaluation_seconds": round(evaluation_seconds, 3),
                "overhead_seconds": round(seconds - steps.seconds - evaluation_seconds, 3),
                "peak_memory_bytes": float(peak_memory_bytes()),
                "steps": float(trainer.state.global_step),
            },
        }
    )
    if trainer.is_world_process_zero():
        if not all(torch.isfinite(matrix).all() for pair in trained.values() for matrix in pair):
            raise DataError("Training diverged: the adapter holds NaN or infinity; lower --learning_rate.")
        if trains != "both" and wire is None:
            # What is frozen comes back as it came, also for neurons that the package lacks.
            frozen = "B_OR" if trains == "A" else "A_RI"
            trained = {
                module: pair._replace(**{frozen: getattr(factors[module], frozen)}) for module, pair in trained.items()
            }
        if parent and parent.privacy:
            trained = clipped(trained, factors, parent.privacy.clip)
        control = None
        if scaffold:  # before the update, as `write_update` does with what a codec lost
            control = difference(mean, own)
            write_own(Path(client.state), package.digest, client.round, mean)
        manifest = write_update(
            output,
            trained,
            manifest,
            opened.architecture,
            package.base,
            overwrite=client.overwrite,
            wire=wire,
            lost=lost,
            state=Path(client.state) if client.state else None,
            control=control,
            key=key,
        )
        shutil.rmtree(work, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return manifest


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
        train_client(client, config)
    except FedLargeError as error:
        print(f"hf-fedlarge train: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = os_problem(error)
        if reason is None:
            raise
        where = error.filename or client.output
        print(f"hf-fedlarge train: {where} can't be written: {reason}.", file=sys.stderr)
        return 2
    if config.process_index == 0:
        from hf_fedlarge.update import outcome

        print(f"{client.output}: {outcome(Path(client.output))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
