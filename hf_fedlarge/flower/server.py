"""The ServerApp: a federation's rounds, whose clients Flower reaches.

    [tool.flwr.app.components]
    serverapp = "…:app", in a module that says `from hf_fedlarge.flower.server import app`

    [tool.flwr.app.config]
    federation = "/srv/federation/federation.yaml"    with eval_data, and clients where not whoever joins may take part
    output = "/srv/federation/run"                    the run directory, which is all of the federation's state
    store = "s3://bucket/packages"                    any fsspec URL that clients can read packages from

A run that was stopped or killed goes on with another `flwr run`: Flower's own state of a run is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from pydantic import Field

from hf_fedlarge.config import FederationConfig, Record, checked, load_federation
from hf_fedlarge.flower.mailbox import Mailbox
from hf_fedlarge.keys import read_key
from hf_fedlarge.orders import PATIENCE_SECONDS
from hf_fedlarge.progress import hide_bars
from hf_fedlarge.rounds import Report, drive
from hf_fedlarge.serve import StoreClients
from hf_fedlarge.store import Store

GOODBYE_SECONDS = 60.0  # for clients to hear what became of their last updates; nothing waits for them to
app = ServerApp()


class ServerSettings(Record):
    """What `[tool.flwr.app.config]` holds.

    `poll` is the seconds between two looks for messages, `patience` those after which it ends where nobody checks in
    or, without a deadline, answers; `key` is the file of the server's private key (`voice.py`).
    """

    federation: str
    output: str
    store: str
    stop: bool = True
    poll: Annotated[float, Field(gt=0)] = 1.0
    patience: Annotated[float, Field(gt=0)] = PATIENCE_SECONDS
    key: str | None = None


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation, or go on with it."""
    from hf_fedlarge.tables import print_summary
    from hf_fedlarge.trainers.launch import check_training

    settings = checked(ServerSettings, dict(context.run_config), "[tool.flwr.app.config]")
    config, run = load_federation(Path(settings.federation).expanduser()), Path(settings.output).expanduser()
    check_training(config.training)
    hide_bars()
    key = Path(settings.key) if settings.key else None
    how = {"stop": settings.stop, "poll": settings.poll, "patience": settings.patience, "key": key}
    print_summary(serve_over_flower(config, run, settings.store, grid, _report, **how))


def serve_over_flower(
    config: FederationConfig,
    run: Path,
    url: str,
    grid: Grid,
    report: Report,
    *,
    stop: bool = True,
    poll: float = 1.0,
    patience: float = PATIENCE_SECONDS,
    key: Path | None = None,
) -> dict[str, Any]:
    """Run a federation of clients that Flower reaches, or go on with one that was interrupted.

    Args:
        config: the federation; `eval_data` is what it is evaluated on, and `clients`, if given, who may join.
        run: the server's own directory, as `run_federation` makes it.
        url: of the store that packages are put into, for clients to read.
        grid: Flower's.
        report: told of each step in a line.
        stop: end with an error where two rounds in a row made the full model worse than the base.
        poll: seconds between two looks for messages.
        patience: as `serve_federation` has it.
        key: the file of the server's private key, which signs what it says to clients; None: it is not signed.

    Returns:
        The summary, as `summary.json` has it.

    Raises:
        FedLargeError: as `run_federation`.
    """
    packages, private = Store(url), read_key(key) if key else None
    mailbox = Mailbox(run / "mailbox", grid, report, private)
    clients = StoreClients(mailbox, report, poll, patience, packages=packages, key=private)
    summary = drive(config, run, clients, report, stop=stop)
    clients.patience.look(mailbox.say_goodbye, GOODBYE_SECONDS, poll)
    return summary


def _report(line: str) -> None:
    print(line, flush=True)
