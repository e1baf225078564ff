"""One round driven with updates that were made beforehand, killed where a test says; for tests of `server.py`."""

import math
import shutil
from pathlib import Path

from killed import dying

from hf_fedlarge import artifacts, server
from hf_fedlarge.architectures import describe
from hf_fedlarge.artifacts import AdapterManifest, PackageManifest, read_manifest, staged_directory
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.config import FederationConfig
from hf_fedlarge.errors import UpdateRefusedError
from hf_fedlarge.journal import Journal
from hf_fedlarge.package import package_config
from hf_fedlarge.plan import CheckIn
from hf_fedlarge.server import RoundServer
from hf_fedlarge.update import Asked, Expected, validate_update

CLIENTS = ("ann", "ben", "cleo", "dan")


def config(**changes):
    return FederationConfig.model_validate(
        {"checkpoint": "x", "data": {"source": "x"}, "cohort": 3, "min_updates": 2} | changes
    )


def make_server(home: Path, run: Path, **changes) -> RoundServer:
    package = read_manifest(home / "package", PackageManifest)
    start = read_manifest(home / "start", AdapterManifest)
    architecture = describe(package_config(home / "package"))

    def validate(number, client, update):
        return validate_update(
            update, Expected(package, architecture, start.lora, number, start.digest, Asked(client, 100, 1000))
        )

    return RoundServer(run / "rounds", 1, Journal(run / "journal.jsonl"), config(**changes), validate)


def check_ins():
    return [CheckIn(client, examples=10) for client in CLIENTS]


def close(round_server: RoundServer, order, home: Path, evaluate=lambda adapter: {"loss_small": 2.0}):
    return round_server.close(
        order,
        lambda updates, late, adapter: aggregate_updates(
            updates, home / "package", adapter, previous=home / "start", min_updates=2
        ),
        evaluate,
        lambda manifest, updates: {"clients": [path.name for path in updates]},
    )


def drive(home: Path, run: Path, sent: list[str] | None = None, broken: int = 0, **changes):
    """The whole round; `sent` is told which clients had to send their update, and `broken` attempts come to nothing."""
    round_server = make_server(home, run, **changes)
    if round_server.committed.exists():
        return round_server.finish()
    order = round_server.open(check_ins())
    while waiting := round_server.waiting(order):
        client = waiting[0]
        round_server.asked(client, 100)
        update = round_server.work / client
        if not update.exists():
            if sent is not None:
                sent.append(client)
            with staged_directory(update) as staging:
                shutil.copytree(home / "updates" / client, staging, dirs_exist_ok=True)
        round_server.receive(order, client, update)
    loss = math.nan if order.attempt <= broken else 2.0
    try:
        return close(round_server, order, home, lambda _: {"loss_small": loss})
    except UpdateRefusedError:
        if order.attempt > broken:
            raise
        return drive(home, run, sent, broken, **changes)


def drive_until(home: Path, run: Path, step: int) -> None:
    """Drive, and die by SIGKILL at the `step`-th beginning or end of a write; end in peace if there are fewer."""
    counted = dying(step)
    Journal.write = counted(Journal.write)
    artifacts.commit_directory = counted(artifacts.commit_directory)
    server.commit_directory = counted(server.commit_directory)
    server.write_json = counted(server.write_json)
    shutil.rmtree = counted(shutil.rmtree)
    drive(home, run)
