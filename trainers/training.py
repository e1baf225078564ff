"""One client's training, from its arguments to its update (`client.py` has the program around it)."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
from hf_fedlarge.encoding import marking_template
from hf_fedlarge.errors import ConfigError, DataError
from hf_fedlarge.evaluation import evaluate_model
from hf_fedlarge.feedback import read_lost, with_lost
from hf_fedlarge.keys import PrivateKey, read_key
from hf_fedlarge.memory import is_out_of_memory, peak_memory_bytes, saying_out_of_memory
from hf_fedlarge.package import package_architecture, package_config
from hf_fedlarge.partition import hold_out
from hf_fedlarge.privacy import clipped
from hf_fedlarge.scaffold import difference, read_common, read_own, write_own
from hf_fedlarge.templates import check_rendering
from hf_fedlarge.tensors import Factors
from hf_fedlarge.trainers.resume import prepare_work
from hf_fedlarge.trainers.scaffold import Corrected
from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig, StreamingLoraTrainer
from hf_fedlarge.trainers.worker import Opened, Steps, Worker
from hf_fedlarge.update import write_update
from hf_fedlarge.wire import Wire

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_fedlarge.trainers.client import ClientArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Task:
    """What is asked for, found good: a package, the adapter to start from, and what is known of the update already."""

    package: PackageManifest
    parent: AdapterManifest | None
    fresh: UpdateManifest

    @property
    def trains(self) -> Literal["both", "A", "B"]:
        """Which factors."""
        return self.parent.trains if self.parent else "both"

    @property
    def is_corrected(self) -> bool:
        """Whether steps are corrected by control variates."""
        return self.parent is not None and CONTROL_WEIGHTS in self.parent.files


@dataclass(frozen=True)
class _Start:
    """What training starts from, by module in global numbers.

    `lost` is what the codec lost before, which comes on top of `factors`; `own` and `correction` are control variates.
    """

    factors: dict[str, Factors]
    wire: Wire | None
    lost: dict[str, Factors]
    own: dict[str, Factors] = field(default_factory=dict)
    correction: dict[str, Factors] = field(default_factory=dict)


@dataclass(frozen=True)
class _Trained:
    """What came of it; `mean` are the mean gradients, where steps were corrected."""

    trainer: StreamingLoraTrainer
    steps: Steps
    factors: dict[str, Factors]
    mean: dict[str, Factors]
    before: float | None
    after: float | None
    evaluation_seconds: float


Look = Callable[[StreamingLoraTrainer], None]


def train(
    client: ClientArguments, config: StreamingLoraConfig, worker: Worker | None, look: Look | None
) -> UpdateManifest:
    """`client.train_client`, for one process at a time."""
    started = time.monotonic()
    package, output = Path(client.package), Path(client.output)
    _check_arguments(client, config)
    worker = worker or Worker()
    check_output(output, client.overwrite)
    key = read_key(Path(client.key)) if client.key else None
    task = _read_task(client)
    with saying_out_of_memory(config.device):
        data, held_out = _read_examples(client, config)
        checkpoint = _prepare(client, config, task, data, held_out)
        start = _read_start(client, config, task, worker)
        with worker.lend(
            package,
            task.package,
            task.fresh.lora,
            with_lost(start.factors, start.lost),
            trains=task.trains,
            dtype=torch.bfloat16 if config.bf16 else torch.float32,
            device=config.device,
            verify=client.verify,
        ) as opened:
            trained = _train(client, config, opened, start, data, held_out, checkpoint, look)
        trainer, seconds = trained.trainer, time.monotonic() - started
        manifest = _described(task, trained, seconds)
        if trainer.is_world_process_zero():
            manifest = _write(client, task, start, trained, manifest, opened, key)
            shutil.rmtree(config.output_dir, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return manifest


def _check_arguments(client: ClientArguments, config: StreamingLoraConfig) -> None:
    if config.resume_from_checkpoint is not None:
        raise ConfigError(
            "--resume_from_checkpoint can't be used; leave it out: training that was interrupted resumes when the same "
            "command is given again, and --adapter says where to start from."
        )
    if not 0 <= client.proximal < float("inf"):
        raise ConfigError(f"--proximal {client.proximal} is out of range; expected 0 or more.")


def _read_task(client: ClientArguments) -> _Task:
    package = read_manifest(Path(client.package), PackageManifest)
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
    task = _Task(package, parent, fresh)
    if task.is_corrected and not client.state:
        raise ConfigError(
            "This federation corrects its clients' steps (scaffold), for which each keeps a file from round to round; "
            "give --state, a directory of this client's own."
        )
    return task


def _read_examples(client: ClientArguments, config: StreamingLoraConfig) -> tuple[Dataset, Dataset | None]:
    """Those to train on, and those to evaluate on."""
    data = load_examples(client.data)
    if client.eval_data:
        held_out = load_examples(client.eval_data)
    else:
        data, held_out = hold_out(data, client.held_out, seed=0, at_most=client.eval_examples)
    if held_out is not None:
        held_out = held_out.select(range(min(client.eval_examples, len(held_out))))
    if config.eval_strategy != "no" and not held_out:
        raise ConfigError(
            f"--eval_strategy {config.eval_strategy.value} has no held-out examples to evaluate; give --eval_data, or "
            "--held_out and --eval_examples above 0."
        )
    return data, held_out


def _prepare(
    client: ClientArguments, config: StreamingLoraConfig, task: _Task, data: Dataset, held_out: Dataset | None
) -> str | None:
    """Make the work directory beside the update; returns the checkpoint in it to go on from."""
    output = Path(client.output)
    work = output.with_name(f".{output.name}.work")
    config.output_dir = str(work)
    state = {"client": asdict(client), "package": task.package.digest, "adapter": task.fresh.adapter}
    state["config"] = config.to_dict()
    state["examples"] = [None if rows is None else digest_of(rows) for rows in (data, held_out)]
    state["memory_budget"] = state["config"].pop("memory_budget")
    return prepare_work(work, json.loads(json.dumps(state, default=str)), config)


def _read_start(client: ClientArguments, config: StreamingLoraConfig, task: _Task, worker: Worker) -> _Start:
    directory, package, lora = Path(client.package), task.package, task.fresh.lora
    if task.parent is None:
        return _Start(
            initial_factors(describe(package_config(directory)), package.kept_layers, lora, config.seed), None, {}
        )
    adapter = Path(client.adapter)
    factors = worker.read(adapter, task.parent)
    wire, lost, own, correction = None, {}, {}, {}
    if task.fresh.codec.name != "fp32":
        architecture = package_architecture(directory, package)
        wire = Wire(task.fresh.codec, AdapterReader(adapter), architecture, package.kept_layers, lora)
        lost = read_lost(Path(client.state), package.digest, client.round, wire) if client.state else {}
    if task.is_corrected:
        shapes = expected_shapes(package_architecture(directory, package), package.kept_layers, lora)
        own = read_own(Path(client.state), package.digest, client.round, shapes)
        correction = difference(read_common(adapter, list(shapes)), own)
    return _Start(factors, wire, lost, own, correction)


def _train(
    client: ClientArguments,
    config: StreamingLoraConfig,
    opened: Opened,
    start: _Start,
    data: Dataset,
    held_out: Dataset | None,
    checkpoint: str | None,
    look: Look | None,
) -> _Trained:
    check_rendering(opened.tokenizer.chat_template, data, opened.tokenizer.special_tokens_map)
    layers = opened.package.kept_layers
    steps, corrected, evaluation_seconds = Steps(), None, 0.0
    if start.correction:
        corrected = Corrected(parameter_values(opened.model, start.correction, opened.architecture, layers))
    try:
        if config.assistant_only_loss:
            marking_template(opened.tokenizer)
        trainer = StreamingLoraTrainer(
            opened.model,
            config,
            train_dataset=training_columns(data),
            eval_dataset=training_columns(held_out) if config.eval_strategy != "no" else None,
            processing_class=opened.tokenizer,
            callbacks=[steps, corrected] if corrected else [steps],
            proximal=client.proximal,
        )
    except ConfigError:
        raise
    except (ValueError, RuntimeError, ArithmeticError, TemplateError) as error:  # a chat template is a program
        if is_out_of_memory(error):
            raise
        raise DataError(f"{client.data} can't be trained on: {error}") from error
    if len(trainer.train_dataset) == 0:
        raise DataError(f"{client.data} has no example with a labelled token within {config.max_length} tokens.")
    if look:
        look(trainer)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            output = Path(client.output)  # the work directory is removed at the end
            callback.logging_dir = str(output.with_name(f"{output.name}.logs"))

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

    before = held_out_loss()
    trainer.train(resume_from_checkpoint=checkpoint)
    after = held_out_loss()
    factors = get_factors(opened.model, opened.architecture, layers)
    mean = get_factors(opened.model, opened.architecture, layers, of=corrected.mean) if corrected else {}
    return _Trained(trainer, steps, factors, mean, before, after, evaluation_seconds)


def _described(task: _Task, trained: _Trained, seconds: float) -> UpdateManifest:
    """The update's manifest but for its files, of a training that took `seconds` in all."""
    state, steps, evaluation_seconds = trained.trainer.state, trained.steps, trained.evaluation_seconds
    return task.fresh.model_copy(
        update={
            "examples": trained.trainer.labelled_examples,
            "tokens": int(state.num_input_tokens_seen),
            "loss_before": trained.before,
            "loss_after": trained.after,
            "measured": {
                "seconds": round(seconds, 3),
                "train_seconds": round(steps.seconds, 3),
                "evaluation_seconds": round(evaluation_seconds, 3),
                "overhead_seconds": round(seconds - steps.seconds - evaluation_seconds, 3),
                "peak_memory_bytes": float(peak_memory_bytes()),
                "steps": float(state.global_step),
            },
        }
    )


def _write(
    client: ClientArguments,
    task: _Task,
    start: _Start,
    trained: _Trained,
    manifest: UpdateManifest,
    opened: Opened,
    key: PrivateKey | None,
) -> UpdateManifest:
    factors, parent = trained.factors, task.parent
    if not all(torch.isfinite(matrix).all() for pair in factors.values() for matrix in pair):
        raise DataError("Training diverged: the adapter holds NaN or infinity; lower --learning_rate.")
    if task.trains != "both" and start.wire is None:
        # What is frozen comes back as it came, also for neurons that the package lacks.
        frozen = "B_OR" if task.trains == "A" else "A_RI"
        factors = {
            module: pair._replace(**{frozen: getattr(start.factors[module], frozen)})
            for module, pair in factors.items()
        }
    if parent and parent.privacy:
        factors = clipped(factors, start.factors, parent.privacy.clip)
    control = None
    if task.is_corrected:  # before the update, as `write_update` does with what a codec lost
        control = difference(trained.mean, start.own)
        write_own(Path(client.state), task.package.digest, client.round, trained.mean)
    return write_update(
        Path(client.output),
        factors,
        manifest,
        opened.architecture,
        task.package.base,
        overwrite=client.overwrite,
        wire=start.wire,
        lost=start.lost,
        state=Path(client.state) if client.state else None,
        control=control,
        key=key,
    )
