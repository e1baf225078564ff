"""What a client does for one order that came by Flower, be it in the ClientApp's process or in a resident one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fedlarge.config import ClientName, Record
from hf_fedlarge.orders import Work
from hf_fedlarge.progress import hide_bars
from hf_fedlarge.store import Store

if TYPE_CHECKING:
    from hf_fedlarge.jobs import Train


class NodeSettings(Record):
    """What `--node-config` holds, with `-` for `_`: as the options of `hf-fedlarge join`.

    `store` is where this client reads packages, instead of at the URL that the server gives, and `worker` is the
    directory of a resident process that trains in place of the ClientApp's own (`resident.py`).
    """

    client: ClientName
    data: str
    eval_data: str | None = None
    cache: str | None = None
    key: str | None = None
    keys: str | None = None
    server_key: str | None = None
    store: str | None = None
    worker: str | None = None
    memory_budget: str | None = None


def take_part(
    settings: NodeSettings, mailbox: Store, work: Work, report: Callable[[str], None], train: Train | None = None
) -> None:
    """Answer the order that lies in `mailbox`; whoever calls looks to its deadline.

    Args:
        settings: the client's own.
        mailbox: where the order and the adapter lie, and the answer is put.
        work: what the order asks of this client.
        report: told of each step in a line.
        train: trains and writes the update; None: in this process.

    Raises:
        FedLargeError: why there is no answer.
    """
    began = time.monotonic()
    from hf_fedlarge.processor import computing_device, describe_device
    from hf_fedlarge.trainers.join import join  # takes seconds, and only who trains needs it

    hide_bars()
    report(f"libraries loaded in {time.monotonic() - began:.1f} s; {describe_device(computing_device())}")
    join(
        mailbox.url,
        settings.client,
        settings.data,
        eval_data=settings.eval_data,
        cache=Path(settings.cache) if settings.cache else None,
        key=Path(settings.key) if settings.key else None,
        keys=Path(settings.keys) if settings.keys else None,
        packages=settings.store or work.package_store,
        server_key=settings.server_key,
        memory_budget=settings.memory_budget,
        step=True,
        report=report,
        train=train,
    )
