"""Run a federation: shrink, then rounds of select, train, validate, aggregate, evaluate, commit, then merge.

The run directory is the state, and each step makes one directory in it by a rename, so that a rerun after a kill at
any point goes on from what is whole and ends with the same bytes:

    run/
      federation.json    the settings that it was begun with; a rerun must have the same but for a few (`rerun.py`)
      check_ins.json     who is there, with how many examples
      clients/NAME/      train.jsonl and held_out.jsonl of a simulated client; state/, what it keeps; its key.pem
      allowed_keys.json  the keys that clients sign with, where `keys` is `auto`
      held_out.jsonl     `eval_data`, or the simulated clients' held-out examples together
      package/           the shrunk model; its download is counted in every client's first round
      rounds/0000/       the adapter that changes nothing
      rounds/0001/       adapter/ and round.json; a round is committed by the rename of this directory (`server.py`)
      store.json         of a served run: what its orders in the store are known by (`serve.py`)
      journal.jsonl      what was done, whose updates count, how many bytes went where (`journal.py`)
      merged/            the checkpoint with the last adapter folded in
      summary.json

How the clients are reached is given (`clients.Clients`): nothing here knows whether they train in this process or
elsewhere.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from hf_fedlarge.artifacts import (
    AdapterManifest,
    CheckpointManifest,
    PackageManifest,
    UpdateManifest,
    read_manifest,
    verify_files,
    write_json,
)
from hf_fedlarge.clients import HELD_OUT, Clients, SimulatedClients
from hf_fedlarge.coherence import TRAINING_DEFAULTS
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.config import FederationConfig
from hf_fedlarge.data import load_examples, public_name
from hf_fedlarge.encoding import check_examples
from hf_fedlarge.errors import ConfigError, FedLargeError, OutputError, UpdateRefusedError
from hf_fedlarge.evaluation import as_record, evaluate, generate_texts, load_model
from hf_fedlarge.hub import resolve_checkpoint
from hf_fedlarge.jobs import Jobs, Train
from hf_fedlarge.journal import Journal
from hf_fedlarge.keys import read_allowed
from hf_fedlarge.ledger import PrivacyEntry
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.merge import merge
from hf_fedlarge.package import load_tokenizer
from hf_fedlarge.privacy import spent
from hf_fedlarge.report import client_loss, peaks, traffic
from hf_fedlarge.rerun import SETTINGS, begun_with
from hf_fedlarge.secure_sum import aggregate_sum
from hf_fedlarge.server import Order, RoundServer
from hf_fedlarge.tier_packages import check_packages, make_tier_package, make_tiers
from hf_fedlarge.transfer import transfer_report
from hf_fedlarge.update import outcome, validate_update
from hf_fedlarge.weighting import weighing

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
_BAD_ROUNDS = 2  # in a row, before a run stops
_ATTEMPTS = 3  # at a round, each with another cohort
_NAMED = 20  # clients, in a line

Report = Callable[[str], None]


def run_federation(
    config: FederationConfig, run: Path, train: Train, report: Report = logger.info, *, stop: bool = True
) -> dict[str, Any]:
    """Run a federation of simulated clients to its end, or go on with one that was interrupted.

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
    return drive(config, run, SimulatedClients(train), report, stop=stop)


def drive(
    config: FederationConfig, run: Path, clients: Clients, report: Report = logger.info, *, stop: bool = True
) -> dict[str, Any]:
    """`run_federation` with clients that are reached in any way."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(f"{run} is in use by another server; wait for it or choose another --output.") from error
    except OSError as error:
        raise OutputError(f"{run} can't be written: {error.strerror}.") from error
    with lock:
        return _Federation(config, run, clients, report, stop).run_to_end()


class _Federation:
    """One run directory and the steps on it. Every step is skipped where its result is there already."""

    def __init__(self, config: FederationConfig, run: Path, clients: Clients, report: Report, stop: bool) -> None:
        self.config, self.run, self.clients, self.report, self.stop = config, run, clients, report, stop
        self.package = run / "package"
        self.journal, self._weigh = Journal(run / "journal.jsonl"), weighing(config.weighting)

    def run_to_end(self) -> dict[str, Any]:
        self._check_settings()
        if not self.package.exists():
            check_packages(self.checkpoint, self.config)
        prepared = self.clients.prepare(self.config, self.run, self._begin)
        if prepared:
            self.report(prepared)
        if not self.package.exists():
            make_tier_package(self.checkpoint, self.config, self.config, self.package, self.revision, self.report)
        package = read_manifest(self.package, PackageManifest)
        verify_files(self.package, package)
        if not self._adapter(0).exists():
            start_adapter(
                self.package,
                self._adapter(0),
                self.config.lora,
                self.config.seed,
                aggregator=self.config.aggregator,
                scaffold=self.config.scaffold,
                privacy=self.config.privacy,
            )
        self._baseline()
        tiers = make_tiers(self.checkpoint, self.config, self.run, self.revision, self.report)
        self.jobs = Jobs(self.config, self.run, self._adapter, tiers, self.journal)
        self.jobs.make_keys()
        for number in range(1, self.config.rounds + 1):
            server = RoundServer(self.run / "rounds", number, self.journal, self.config, self._validate)
            if server.committed.exists():
                server.finish()
            else:
                self._check_that_it_helps(number)
                self._run_round(server)
        self.clients.end(self._adapter(self.config.rounds))
        return self._finish(package)

    def _check_settings(self) -> None:
        """A rerun must have the settings of the run, and goes on with the revision that the run began with."""
        if self.config.keys not in (None, "auto"):
            read_allowed(Path(self.config.keys))
        if self.config.privacy:
            spent(self.config.privacy, [])  # before anything is made, if what computes it is not there
        revision = begun_with(self.run, self.config)
        self.clients.check(self.config, self.run)
        if self.config.package and not self.package.exists():  # before a checkpoint is fetched for it
            given = Path(self.config.package)
            verify_files(given, read_manifest(given, PackageManifest), published=True)
        self.checkpoint, self.revision = resolve_checkpoint(self.config.checkpoint, revision)

    def _begin(self, evaluated: Dataset, trained: Dataset | None) -> None:
        """The settings become the run's, now that all is looked at that can be refused without computing layers."""
        how = self._how()
        limits = {"max_length": how["max_length"], "assistant_only": how["assistant_only"]}
        check_examples(self.checkpoint, evaluated, trained, **limits)
        write_json(self.run / SETTINGS, {"settings": self.config.model_dump(mode="json"), "revision": self.revision})

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
                "Lower the learning rate and go on with --no-stop, or keep more of the model with another --output."
            )

    def _validate(self, number: int, client: str, update: Path) -> UpdateManifest:
        manifest = validate_update(update, self.jobs.expected(client, number))
        try:
            self._weigh(manifest)  # while the client can still be told that this can't be done
        except ConfigError as error:
            raise UpdateRefusedError(f"{client} refused: {error}") from error
        return manifest

    def _run_round(self, server: RoundServer) -> None:
        started, number = time.monotonic(), server.number

        def aggregate(updates: list[Path], late: dict[Path, int], adapter: Path) -> None:
            if self.config.secure:
                aggregate_sum(server, self.package, adapter, self._adapter(number - 1), self.config)
                return
            number_of = dict.fromkeys(updates, number) | late
            aggregate_updates(
                list(number_of),
                self.package,
                adapter,
                settings=self.config,
                previous=self._adapter(number - 1),
                older=[self._adapter(past - 1) for past in sorted(set(late.values()))],
                round_number=number,
                min_updates=server.settings.min_updates,
                tiers=self.jobs.derived(number),
                asked={update: self.jobs.asked(update.name, its) for update, its in number_of.items()},
                codec=self.config.wire_codec,
                population=len(self.jobs.check_ins.keys() | {update.name for update in number_of}),
                draw=server.draw,
            )

        def evaluate(adapter: Path) -> dict[str, float]:
            return {
                "loss_small": self._loss(self.package, adapter),
                "loss_full": self._loss(self.checkpoint, adapter),
            }

        def describe_round(adapter: AdapterManifest, updates: list[Path]) -> dict[str, Any]:
            return {
                **traffic(self.journal, number),
                "energy_dropped": adapter.energy_dropped,
                "energy_carried": adapter.energy_carried,
                "seconds": round(time.monotonic() - started, 1),
                **peaks(updates),
                "client_loss": client_loss(updates),
                "clients": [entry.model_dump() for entry in adapter.contributions],
                "privacy": adapter.privacy and adapter.privacy.model_dump(),
                "secure": server.stage(order, "reveal"),
            }

        for attempt in range(1, _ATTEMPTS + 1):
            self.clients.check_in(self.jobs, server)
            order = server.open(list(self.jobs.check_ins.values()), self.jobs.least_bytes)
            for line in filter(None, (self.jobs.describe_pace(client, number) for client in order.clients)):
                self.report(line)
            few = len(order.clients) <= _NAMED
            self.report(f"round {number}: {', '.join(order.clients) if few else f'{len(order.clients)} clients'}")
            try:
                self._ask(server, order)
                record = server.close(order, aggregate, evaluate, describe_round)
                break
            except UpdateRefusedError as error:
                # Without a cohort all clients were asked, and nobody else can be drawn. Of masked updates none is left.
                if attempt == _ATTEMPTS or (self.config.cohort is None and not self.config.secure):
                    raise
                self.report(f"{error}")
        own, before = record["client_loss"], ""
        if own:
            clients = "1 client" if own["clients"] == 1 else f"{own['clients']} clients"
            before = f", {own['before']:.3f} on held-out examples of {clients} before it"
        epsilon = f"; {PrivacyEntry(**record['privacy']).sentence}" if record["privacy"] else ""
        self.report(
            f"round {number} committed: loss {record['loss_small']:.3f} (package), "
            f"{record['loss_full']:.3f} (full model){before}{epsilon}"
        )

    def _ask(self, server: RoundServer, order: Order) -> None:
        """Hand what the order's clients answer to the round, until it has what it wants."""
        down = self.clients.down
        late: list[str] = []
        if down == "offered" and (past := server.keeping):
            late = past.unheard(past.last_order)
        self.jobs.check_budget(self.journal, server.waiting(order), order.round, down, late)

        def asked(client: str) -> None:
            tier = self.jobs.tiers.index(self.jobs.tier_of(client, order.round))
            server.asked(client, self.jobs.missing_bytes(self.journal, client, order.round, down), tier)

        for client, problem in self.clients.answers(self.jobs, server, order, asked):
            if problem is not None:
                server.fail(order, client, problem)
                self.report(f"  {client} did not train: {problem}")
                continue
            self.report(f"  {client}: {outcome(server.work / client)}")
            # What was found in a store was there in time, though the deadline may have passed while it was fetched.
            receipt = server.receive(order, client, server.work / client, in_time=not self.clients.simulated)
            if not receipt.accepted:
                self.report(f"  {receipt.reason}")

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
            "package": {"layers": len(package.layers), "kept": package.kept_layers, "embeddings": package.embeddings},
            "seconds": round(sum(entry["seconds"] for entry in rounds), 1),
            "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in rounds),
            "client_peak_memory_bytes": max(entry["client_peak_memory_bytes"] for entry in rounds),
            "aggregator": self.config.aggregator,
            "privacy": rounds[-1].get("privacy"),
            "simulated": self.clients.simulated,
            "data": public_name(self.config.data.source) if self.clients.simulated else None,
            "eval_data": public_name(self.config.eval_data),
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

    def _held_out(self) -> Any:
        held_out = load_examples(str(self.run / HELD_OUT))
        limit = self.config.eval_examples
        if limit is None or limit >= len(held_out):
            return held_out
        return held_out.shuffle(seed=self.config.seed).select(range(limit))

    def _loss(self, model: Path, adapter: Path | None = None) -> float:
        # Both were made or checked by this run.
        found = evaluate(model, self._held_out(), adapter=adapter, verify=False, **self._how())
        # A broken adapter has its round drawn anew; not with privacy, where chance would count twice.
        return found.loss if adapter and not self.config.privacy else as_record(found)["loss"]

    def _how(self) -> dict[str, Any]:
        """Evaluation as training does it."""
        training = TRAINING_DEFAULTS | self.config.training
        return {
            "max_length": training["max_length"],
            "batch_size": training.get("per_device_eval_batch_size"),
            "assistant_only": training["assistant_only_loss"],
            "report": self.report,
        }

    def _sample(self, model: Path) -> str | None:
        if self.config.sample_prompt is None:
            return None
        prompt = {"prompt": self.config.sample_prompt}
        return generate_texts(load_model(model, verify=False), load_tokenizer(model), [prompt])[0]

    def _record(self, number: int) -> dict[str, Any]:
        return json.loads((self._round(number) / "round.json").read_text())

    def _round(self, number: int) -> Path:
        return self.run / "rounds" / f"{number:04d}"

    def _adapter(self, number: int) -> Path:
        return self._round(number) / "adapter"
