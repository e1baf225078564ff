"""Run a federation: shrink, then rounds of select, train, validate, aggregate, evaluate, commit, then merge.

The run directory is the state, and each step makes one directory in it by a rename, so that a rerun after a kill at
any point goes on from what is whole and ends with the same bytes:

    run/
      federation.json    the settings; a rerun must have the same
      check_ins.json     who is there, with how many examples
      clients/NAME/      train.jsonl and held_out.jsonl of a simulated client; state/, what its codec lost
      held_out.jsonl     the clients' held-out examples together
      package/           the shrunk model, with its download counted in every client's first round
      rounds/0000/       the adapter that changes nothing
      rounds/0001/       adapter/ and round.json; a round is committed by the rename of this directory
      merged/            the checkpoint with the last adapter folded in
      summary.json

How a client trains is given as a function, so that nothing here knows whether it runs in this process or elsewhere.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from hf_fedlarge.adapters import target_linears
from hf_fedlarge.architectures import describe, load_config
from hf_fedlarge.artifacts import (
    AdapterManifest,
    CheckpointManifest,
    PackageManifest,
    read_manifest,
    staged_directory,
    verify_files,
    write_json,
)
from hf_fedlarge.calibrate import make_package, plan_package
from hf_fedlarge.collect import aggregate_updates, start_adapter
from hf_fedlarge.config import Codec, DataConfig, FederationConfig
from hf_fedlarge.data import STDLIB, concatenate, load_examples, training_columns, write_jsonl
from hf_fedlarge.errors import ConfigError, FedLargeError, OutputError, UpdateRefusedError
from hf_fedlarge.evaluation import as_record, evaluate, generate_text, load_model
from hf_fedlarge.hub import resolve_checkpoint
from hf_fedlarge.merge import merge
from hf_fedlarge.package import load_tokenizer
from hf_fedlarge.partition import hold_out, split_by_config
from hf_fedlarge.plan import CheckIn, sample_cohort
from hf_fedlarge.report import peaks, traffic
from hf_fedlarge.transfer import transfer_report
from hf_fedlarge.update import Asked, outcome

logger = logging.getLogger(__name__)
_BAD_ROUNDS = 2  # in a row, before a run stops


@dataclass(frozen=True)
class ClientJob:
    """What one client is asked to do in one round: directories and files in, an update directory out."""

    client: str
    round: int
    package: Path
    adapter: Path
    data: Path
    eval_data: Path | None
    output: Path
    training: dict[str, Any]
    codec: Codec
    state: Path


DEFAULT_MAX_LENGTH = 1024  # of SFTConfig
Train = Callable[[ClientJob], None]
Report = Callable[[str], None]


def run_federation(
    config: FederationConfig, run: Path, train: Train, report: Report = logger.info, *, stop: bool = True
) -> dict[str, Any]:
    """Run a federation to its end, or go on with one that was interrupted.

    Args:
        config: the federation.
        run: its directory, made if it isn't there.
        train: trains one client and writes its update; what it raises of ours is reported, and the client is left out.
        report: told of each step in a line.
        stop: end with an error where two rounds in a row made the full model worse than the base.

    Returns:
        The summary, as `summary.json` has it.

    Raises:
        FedLargeError: settings that differ from the run's, another server on the run directory, no valid update, …
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(f"{run} is in use by another server; wait for it or choose another --output.") from error
    except OSError as error:
        raise OutputError(f"{run} can't be written: {error.strerror}.") from error
    with lock:
        return _Federation(config, run, train, report, stop).run_to_end()


class _Federation:
    """One run directory and the steps on it. Every step is skipped where its result is there already."""

    def __init__(self, config: FederationConfig, run: Path, train: Train, report: Report, stop: bool) -> None:
        self.config, self.run, self.train, self.report, self.stop = config, run, train, report, stop
        self.settings = config.model_dump(mode="json")
        self.package = run / "package"

    def run_to_end(self) -> dict[str, Any]:
        self._check_settings()
        if not self.package.exists():
            plan = plan_package(self.checkpoint, self.config)
        target_linears(describe(load_config(self.checkpoint)), self.config.lora)
        self._check_in()
        if not self.package.exists():
            self.report(plan.describe())
            base_id = self.config.base_id or (self.config.checkpoint if self.revision else None)
            make_package(plan, self.config, self.package, base_id=base_id, revision=self.revision)
        package = read_manifest(self.package, PackageManifest)
        verify_files(self.package, package)
        if not self._adapter(0).exists():
            start_adapter(self.package, self._adapter(0), self.config.lora, self.config.seed)
        self._baseline()
        for number in range(1, self.config.rounds + 1):
            if not self._round(number).exists():
                self._check_that_it_helps(number)
                self._run_round(number, package)
        return self._finish(package)

    def _check_settings(self) -> None:
        """A rerun must have the settings of the run, and goes on with the revision that the run began with."""
        path = self.run / "federation.json"
        found = json.loads(path.read_text()) if path.exists() else None
        if found is not None:
            # More rounds may be asked for, and another way to start clients: neither changes what was committed.
            changed = sorted(
                key
                for key in (self.settings.keys() | found["settings"].keys()) - {"rounds", "launcher"}
                if self.settings.get(key) != found["settings"].get(key)
            )
            if changed:
                raise ConfigError(
                    f"{self.run} was run with other settings for {', '.join(changed)}; choose another --output."
                )
        revision = found["revision"] if found else self.config.revision
        self.checkpoint, self.revision = resolve_checkpoint(self.config.checkpoint, revision)

    def _check_in(self) -> None:
        """Split the data among simulated clients, once; each says how many examples it has.

        The settings become the run's here, after all of them have been read and found good.
        """
        path = self.run / "check_ins.json"
        if path.exists():
            return
        settings = self.config.data
        local = {} if settings.source == STDLIB or Path(settings.source).exists() else _hub_options(settings)
        clients = split_by_config(load_examples(settings.source, **local), settings, self.config.seed)
        needed = max(self.config.cohort or 1, self.config.min_updates)
        if len(clients) < needed:
            raise ConfigError(f"The data makes {len(clients)} clients; {needed} are wanted in a round.")
        write_json(self.run / "federation.json", {"settings": self.settings, "revision": self.revision})
        together, check_ins = [], []
        for name, examples in clients.items():
            if settings.max_examples and settings.max_examples < len(examples):
                examples = examples.shuffle(seed=self.config.seed).select(range(settings.max_examples))
            kept, held_out = hold_out(training_columns(examples), settings.held_out, self.config.seed)
            home = self.run / "clients" / name
            home.mkdir(parents=True, exist_ok=True)
            write_jsonl(kept, home / "train.jsonl")
            if held_out is not None:
                write_jsonl(held_out, home / "held_out.jsonl")
                together.append(held_out)
            check_ins.append({"client": name, "examples": len(kept), "memory_bytes": psutil.virtual_memory().total})
        if not together:
            raise ConfigError("No client has an example to hold out; give each at least two.")
        write_jsonl(concatenate(together), self.run / "held_out.jsonl")
        write_json(path, check_ins)
        self.report(f"{len(check_ins)} clients checked in with {sum(c['examples'] for c in check_ins)} examples")

    def _baseline(self) -> None:
        """The losses that everything is compared with: the base's and the untrained package's."""
        path = self.run / "baseline.json"
        if path.exists():
            return
        losses = {"base": self._loss(self.checkpoint), "package": self._loss(self.package)}
        write_json(path, {"loss": losses, "sample": self._sample(self.checkpoint)})
        self.report(f"held-out loss: base {losses['base']:.3f}, package {losses['package']:.3f}")

    def _check_that_it_helps(self, number: int) -> None:
        """A small model can teach what harms the full one; two rounds of that are enough to see it."""
        if not self.stop or number <= _BAD_ROUNDS:
            return
        base = json.loads((self.run / "baseline.json").read_text())["loss"]["base"]
        last = [self._record(past)["loss_full"] for past in range(number - _BAD_ROUNDS, number)]
        if min(last) > base:
            raise FedLargeError(
                f"Stopped before round {number}: with the adapters of the last {_BAD_ROUNDS} rounds the full model's "
                f"held-out loss is {', '.join(f'{loss:.3f}' for loss in last)}, worse than the base's {base:.3f}. "
                "Lower the learning rate or keep more of the model, or go on with --no-stop."
            )

    def _run_round(self, number: int, package: PackageManifest) -> None:
        started = time.monotonic()
        check_ins = [CheckIn(**entry) for entry in json.loads((self.run / "check_ins.json").read_text())]
        examples = {check_in.client: check_in.examples for check_in in check_ins}
        cohort = sample_cohort(check_ins, self.config.cohort, self.config.seed, number, package.total_bytes)
        self.report(f"round {number}: {', '.join(cohort)}")
        work = self._round(number).with_name(f".{number:04d}.work")
        work.mkdir(parents=True, exist_ok=True)
        refused: list[tuple[str, str]] = []
        updates = []
        for client in cohort:
            update = work / client
            # Trained before the server was killed: an update appears whole or not at all.
            if not update.exists():
                try:
                    self.train(self._job(client, number, update))
                except FedLargeError as error:
                    refused.append((client, str(error)))
                    self.report(f"  {client} did not train: {error}")
                    continue
            updates.append(update)
            self.report(f"  {client}: {outcome(update)}")
        if not updates:
            raise UpdateRefusedError(f"Round {number}: no client trained. {' '.join(cause for _, cause in refused)}")
        with staged_directory(self._round(number)) as staging:
            try:
                collected = aggregate_updates(
                    updates,
                    self.package,
                    staging / "adapter",
                    aggregator=self.config.aggregator,
                    previous=self._adapter(number - 1),
                    weighting=self.config.weighting,
                    round_number=number,
                    min_updates=self.config.min_updates,
                    asked={update: self._asked(update.name, examples[update.name]) for update in updates},
                    codec=self.config.wire_codec,
                )
            except UpdateRefusedError:
                shutil.rmtree(work)  # or every rerun would fail over the same updates
                raise
            refused.extend(collected.refused)
            for client, cause in collected.refused:
                self.report(f"  {client}: {cause}")
            losses = {
                "loss_small": self._loss(self.package, staging / "adapter"),
                "loss_full": self._loss(self.checkpoint, staging / "adapter"),
            }
            have = {client for past in range(1, number) for client in self._record(past)["bytes_by_client"]}
            down = read_manifest(self._adapter(number - 1), AdapterManifest).total_bytes
            record = traffic(updates, down, package.total_bytes, have) | {
                "round": number,
                **losses,
                "energy_dropped": collected.manifest.energy_dropped,
                "seconds": round(time.monotonic() - started, 1),
                **peaks(updates),
                "clients": [entry.model_dump() for entry in collected.manifest.contributions],
                "refused": [{"client": client, "reason": cause} for client, cause in refused],
            }
            write_json(staging / "round.json", record)
        shutil.rmtree(work, ignore_errors=True)
        self.report(
            f"round {number} committed: loss {losses['loss_small']:.3f} (package), "
            f"{losses['loss_full']:.3f} (full model)"
        )

    def _finish(self, package: PackageManifest) -> dict[str, Any]:
        last = self._adapter(self.config.rounds)
        digest = read_manifest(last, AdapterManifest).digest
        merged = self.run / "merged"
        if not merged.exists() or read_manifest(merged, CheckpointManifest).adapter != digest:
            merge(self.checkpoint, last, merged, overwrite=True)
        baseline = json.loads((self.run / "baseline.json").read_text())
        rounds = [self._record(number) for number in range(1, self.config.rounds + 1)]
        summary = {
            "loss": baseline["loss"] | {"merged": self._loss(merged)},
            "transfer": transfer_report(
                self.checkpoint, self.package, last, self._held_out(), verify=False, **self._how()
            ),
            "rounds": rounds,
            "bytes_down": sum(entry["bytes_down"] for entry in rounds),
            "bytes_up": sum(entry["bytes_up"] for entry in rounds),
            "package_bytes": package.total_bytes,
            "package": {
                "layers": len(package.layers),
                "kept": package.kept_layers,
                "embeddings": package.embeddings,
            },
            "seconds": round(sum(entry["seconds"] for entry in rounds), 1),
            "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in rounds),
            "client_peak_memory_bytes": max(entry["client_peak_memory_bytes"] for entry in rounds),
            "aggregator": self.config.aggregator,
            "data": self.config.data.source,
            "held_out_examples": len(self._held_out()),
            "adapter": digest,
            "sample": {
                "prompt": self.config.sample_prompt,
                "before": baseline["sample"],
                "after": self._sample(merged),
            },
        }
        write_json(self.run / "summary.json", summary)
        return summary

    def _asked(self, client: str, examples: int) -> Asked:
        """What a client can have trained on at the most: its examples, as often as the training arguments say."""
        training = self.config.training
        longest = training.get("max_length", DEFAULT_MAX_LENGTH)
        batch = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
        steps = training.get("max_steps", -1)
        passes = math.ceil(training.get("num_train_epochs", 3))
        sequences = steps * batch if steps > 0 else passes * examples
        return Asked(client=client, examples=examples, tokens=sequences * longest)

    def _job(self, client: str, number: int, output: Path) -> ClientJob:
        home = self.run / "clients" / client
        held_out = home / "held_out.jsonl"
        seed = zlib.crc32(f"{self.config.seed}/{number}/{client}".encode())
        return ClientJob(
            client=client,
            round=number,
            package=self.package,
            adapter=self._adapter(number - 1),
            data=home / "train.jsonl",
            eval_data=held_out if held_out.exists() else None,
            output=output,
            training={"seed": seed % 2**31} | self.config.training,
            codec=self.config.wire_codec,
            state=home / "state",
        )

    def _held_out(self) -> Any:
        held_out = load_examples(str(self.run / "held_out.jsonl"))
        limit = self.config.eval_examples
        if limit is None or limit >= len(held_out):
            return held_out
        return held_out.shuffle(seed=self.config.seed).select(range(limit))

    def _loss(self, model: Path, adapter: Path | None = None) -> float:
        # Both were made or checked by this run.
        return as_record(evaluate(model, self._held_out(), adapter=adapter, verify=False, **self._how()))["loss"]

    def _how(self) -> dict[str, Any]:
        """Evaluation as training does it."""
        training = self.config.training
        return {
            "max_length": training.get("max_length", DEFAULT_MAX_LENGTH),
            "batch_size": training.get("per_device_eval_batch_size", 8),
            "assistant_only": training.get("assistant_only_loss", False),
        }

    def _sample(self, model: Path) -> str | None:
        if self.config.sample_prompt is None:
            return None
        return generate_text(load_model(model, verify=False), load_tokenizer(model), self.config.sample_prompt)

    def _record(self, number: int) -> dict[str, Any]:
        return json.loads((self._round(number) / "round.json").read_text())

    def _round(self, number: int) -> Path:
        return self.run / "rounds" / f"{number:04d}"

    def _adapter(self, number: int) -> Path:
        return self._round(number) / "adapter"


def _hub_options(data: DataConfig) -> dict[str, str | None]:
    return {"split": data.hub_split, "revision": data.hub_revision}
