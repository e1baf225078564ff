"""A client of a federation that is served over a store: it waits for orders, trains, and sends updates.

    hf-fedlarge join URL --client lab-3 --data mine.jsonl --result adapter

What is kept between rounds, and when the process is killed, lies in the cache:

    packages/DIGEST/             fetched once, for every client on this machine
    clients/RUN/NAME/0001/       the round's adapter, the training in progress, the update and the terms that it was
                                 trained under (trained.json), secrets of its attempts; sent.json while the server has
                                 not said what became of the update
    clients/RUN/NAME/state/      what it keeps from round to round
    clients/RUN/NAME/over.json   the round after which it was said that the federation is over

The store is not trusted: an order may hold nothing but bounded training arguments (`orders.py`), and what is fetched is
checked against digests and sizes before it is opened. With the server's key what nobody else signed is refused, too
(`voice.py`). Examples never leave this machine.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hf_fedlarge.admission import RefusalDocument, refusal
from hf_fedlarge.artifacts import PackageManifest, write_json, writing
from hf_fedlarge.errors import ArtifactError, FedLargeError, OutputError, StoreError
from hf_fedlarge.jobs import ClientJob, Train
from hf_fedlarge.orders import (
    CHECK_INS,
    FAILED,
    PACKAGE,
    PATIENCE_SECONDS,
    WHOLE,
    CheckInDocument,
    OrderDocument,
    Work,
    failure,
    inbox,
    write_document,
)
from hf_fedlarge.patience import Trouble
from hf_fedlarge.progress import spell_seconds
from hf_fedlarge.store import Store
from hf_fedlarge.trainers.fetch import fetch_adapter, fetch_result
from hf_fedlarge.trainers.launch import in_process
from hf_fedlarge.trainers.secure import SecureMember
from hf_fedlarge.trainers.sites import Site
from hf_fedlarge.update import outcome
from hf_fedlarge.voice import SENT, Ear

logger = logging.getLogger(__name__)
_TRAINED = "trained.json"
_OVER = "over.json"


def join(
    url: str,
    client: str,
    data: str,
    *,
    eval_data: str | None = None,
    cache: Path | None = None,
    once: bool = False,
    step: bool = False,
    poll: float = 5.0,
    patience: float = PATIENCE_SECONDS,
    report: Callable[[str], None] = logger.info,
    train: Train | None = None,
    key: Path | None = None,
    packages: str | None = None,
    keys: Path | None = None,
    server_key: str | None = None,
    memory_budget: str | None = None,
    result: Path | None = None,
) -> None:
    """Take part in a federation until it is over. A client that was killed goes on when it is started again.

    Args:
        url: the store's.
        client: this client's name.
        data: its examples: a file, or a data set of the Hub.
        eval_data: its held-out examples; None: a tenth of `data`, or fewer where the server wants fewer evaluated.
        cache: where packages and unfinished work are kept; None: `DEFAULT_CACHE`.
        once: leave after one round that this client was asked in.
        step: leave after one order, be it for a stage of a round; whoever calls looks to its deadline, and comes back
            with the whole adapter where this leaves nothing but `orders.WHOLE`.
        poll: seconds between two looks into the store.
        patience: seconds after which it ends where no new order is there.
        report: told of each step in a line.
        train: trains and writes the update; None: in this process.
        key: the file of its private key, which signs its updates; None: they are not signed.
        packages: the URL of another store that has the packages; None: they lie with the orders.
        keys: the list of all clients' keys, which have to sign those of secure aggregation, without which nothing is
            sent then; None: the server is believed whose they are, and whether there is secure aggregation.
        server_key: the server's public key, in 64 hexadecimal digits, or the path of a list of its keys, of which one
            has to have signed what the server says; None: whoever can write the store is believed.
        memory_budget: what training may take of the GPU's memory, or without one of this machine's (`2GiB`); None:
            little, and more time.
        result: the directory to keep the federation's last adapter in when it is over; None: it is not fetched.

    Raises:
        ConfigError: a name that can't be a client's, a budget that is none, or a key or list that is none.
        DataError: the examples can't be read.
        ArtifactError: the order can't be read, holds what no order may, is not the server's, or is an old one.
        OutputError: another process of this client is at work, `cache` or `result` can't be written, or `result` is
            something else than an adapter.
        StoreError: there was no new order for as long as `patience`.
    """
    site = Site(
        client,
        data,
        eval_data,
        cache,
        key=key,
        packages=packages,
        keys=keys,
        server_key=server_key,
        memory_budget=memory_budget,
        result=result,
    )
    check_in = site.check_in()
    with _alone(site.directory / "clients", client):
        _Member(Store(url), site, check_in, report, train or in_process(), step).take_part(once, poll, patience)


@contextmanager
def _alone(home: Path, client: str) -> Iterator[None]:
    """Keep a client to one process."""
    lock = FileLock(home / f".{client}.lock")
    with writing(home):
        home.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"{client} takes part in another process already; end that one, or choose another --cache."
        ) from error
    try:
        yield
    finally:
        lock.release()


class _WholeWanted(Exception):  # noqa: N818 - nothing is wrong
    """What changed in an adapter is of no use, and whoever brought the order has to be told before all of it comes."""


class _Member:
    """One client, and what it does when it is asked."""

    def __init__(
        self,
        store: Store,
        site: Site,
        check_in: CheckInDocument,
        report: Callable[[str], None],
        train: Train,
        step: bool,
    ) -> None:
        self._store, self._package_store, self._site, self._client = store, site.package_store(store), site, site.client
        self._check_in, self._report, self._train, self._step = check_in, report, train, step
        self._ear = Ear(store, site.client, site.directory, site.server_key, report)
        self._secure = SecureMember(store, self._ear.order, site.client, site.key, site.keys, report)
        self._trouble = Trouble(report)
        self._answered: tuple[tuple[str, int, int, str], float | None] | None = None  # a step, and until when it was
        self._refused: str | None = None

    def take_part(self, once: bool, poll: float, patience: float) -> None:
        """Answer orders until the federation is over; a store that can't be reached is tried again."""
        checked_in, last, since = None, None, time.monotonic()
        while time.monotonic() - since <= patience:
            try:
                order = self._ear.hear()
                run = order.run if order else ""
                if checked_in != run:  # a federation that begins forgets who checked in before
                    write_document(self._store, f"{CHECK_INS}/{self._client}.json", self._check_in)
                    checked_in = run
                    self._report(f"{self._client} checked in at {self._store.url}")
                if order is None:
                    self._trouble(
                        f"{self._store.url} has no order yet: waiting for a server to begin there; is it the URL that "
                        "the server has?"
                    )
                elif order.state == "over" and self._leaves(order, last, once):
                    return
                if order != last:
                    last, since = order, time.monotonic()
                    if order is not None and order.state == "open" and not (self._step or order.is_open):
                        self._hear_too_late(order)
                is_open = order is not None and (order.state == "open" if self._step else order.is_open)
                work = order.work_of(self._client) if is_open else None
                if order is not None and order.state != "over" and work is None:
                    self._hear_refusal(order.run)
                # A server that was down at the deadline gives a new one, in which what came too late is in time.
                if work is not None and (order.step, order.closes_at) != self._answered:
                    self._answer(order, work)
                    self._answered, since = (order.step, order.closes_at), time.monotonic()
                    if self._step or (once and order.is_last_stage):
                        return
                    continue
                if once and self._answered and (order is None or not order.goes_on(self._answered[0])):
                    return  # left out of a round's later stages
            except StoreError as error:
                self._trouble(f"{error} Trying again.")
            time.sleep(poll)
        raise StoreError(f"{self._store.url} had no new order for {patience:g} s (--patience); ask its server.")

    def _leaves(self, order: OrderDocument, last: OrderDocument | None, once: bool) -> bool:
        """Whether it was this client's federation that is over, and not a former one in the same store.

        What came of it is fetched first: where that fails, it is tried again.
        """
        home = self._ear.home(order)
        told = home / _OVER
        was_there = last is not None and last.run == order.run and last.state != "over"
        was_asked = list(home.glob("[0-9]*")) and not (told.exists() and json.loads(told.read_text()) == order.round)
        if once or was_there or was_asked:
            if self._site.result is not None:
                fetch_result(self._store, order, self._site.result, self._report)
            self._report(f"the federation is over after round {order.round}")
            home.mkdir(parents=True, exist_ok=True)
            write_json(told, order.round)
            return True
        if order != last:
            self._report(
                f"the federation that was here is over after round {order.round}, and {self._client} has nothing to do "
                "with it any more; waiting for the next one"
            )
        return False

    def _hear_too_late(self, order: OrderDocument) -> None:
        """Report that an order was over when it was first seen, if it asks this client."""
        if order.work_of(self._client):
            ago = spell_seconds(time.time() - order.closes_at)
            self._report(
                f"round {order.round} was over for {ago} by this machine's clock when its order was first seen; unless "
                f"{self._client} came late, its clock and the server's have to agree"
            )

    def _hear_refusal(self, run: str) -> None:
        """Report once why the server can't take this client; it may yet, so this one waits."""
        said = self._ear.said(
            refusal(self._client),
            RefusalDocument,
            lambda said: said.is_about(run, self._check_in),
            "why the server can't take this client",
        )
        if said is not None and said.sentence != self._refused:
            self._refused = said.sentence
            self._report(f"{said.sentence}; waiting, as that may change")

    def _answer(self, order: OrderDocument, work: Work) -> None:
        """Train and send the update, or why there is none; what is done already is not done again."""
        place = inbox(order.round, self._client, order.attempt)
        if {FAILED, order.answer_name} & set(self._store.names(place)):
            return
        home = self._ear.home(order)
        update = home / f"{order.round:04d}" / "update"
        try:
            if self._site.keys is not None and order.secure is None:
                raise ArtifactError(
                    "the order would have the update sent unmasked; expected one of secure aggregation, for which "
                    "--keys was given: leave that out if the federation has no `secure`."
                )
            if order.secure is None or order.secure.stage == "keys":
                self._make_update(order, work, home, update)
            if order.secure:
                if order.secure.stage == "masked":
                    write_json(update.with_name(SENT), {"attempt": order.attempt})
                self._secure.answer(order, work, update)
                self._forget(home, order.round)
                return
        except _WholeWanted:
            return
        except StoreError:
            raise
        except FedLargeError as error:
            self._report(f"round {order.round}: no update: {error}")
            write_document(self._store, f"{place}/{FAILED}", failure(str(error)))
            return
        self._report(f"round {order.round}: {outcome(update)}")
        if order.late == "refuse" and not self._is_in_time(order):
            self._report(f"round {order.round} was closed before the update was ready")
            return
        write_json(update.with_name(SENT), {"attempt": order.attempt})
        self._store.send(update, place)
        self._report(f"round {order.round}: update sent")
        self._forget(home, order.round)

    def _forget(self, home: Path, before: int) -> None:
        """Remove what is left of earlier rounds."""
        for older in home.glob("[0-9]*"):
            if older.name < f"{before:04d}":
                shutil.rmtree(older)

    def _make_update(self, order: OrderDocument, work: Work, home: Path, update: Path) -> None:
        package, adapter = self._site.package(work.package), update.with_name("adapter")
        if not package.exists():
            self._report(f"fetching a package of {work.package_bytes / 1e6:.1f} MB")
            if order.round > 1:  # said before, so that one that is fetched again is counted
                place = inbox(order.round, self._client, order.attempt)
                write_document(self._store, f"{place}/{PACKAGE}", failure("it was not here"))
        self._package_store.get(work.package, package, PackageManifest, most_bytes=work.package_bytes)
        self._get_adapter(order, work, home, adapter)
        terms, trained = order.terms(work), update.with_name(_TRAINED)
        if update.exists() and not (trained.exists() and json.loads(trained.read_text()) == terms):
            shutil.rmtree(update)  # of another attempt at the federation's round
        if update.exists():
            return
        write_json(trained, terms)
        self._report(f"round {order.round}: {_what_is_asked(order)}")
        job = ClientJob(
            client=self._client,
            round=order.round,
            package=package,
            adapter=adapter,
            data=Path(self._site.data),
            eval_data=Path(self._site.eval_data) if self._site.eval_data else None,
            output=update,
            training=self._site.training(order),
            proximal=order.proximal,
            eval_examples=order.eval_examples,
            codec=order.codec,
            state=home / "state",
            key=self._site.key,
        )
        self._train(job)
        size = sum(path.stat().st_size for path in update.iterdir())
        if size > work.update_bytes and not order.secure:  # then it isn't this that is sent
            raise ArtifactError(f"the update has {size} bytes; the order takes {work.update_bytes} at most")

    def _get_adapter(self, order: OrderDocument, work: Work, home: Path, adapter: Path) -> None:
        place = inbox(order.round, self._client, order.attempt)

        def take_whole(cause: str) -> None:
            self._report(f"round {order.round}: fetching the whole adapter: {cause}")
            # Said before it is fetched, so that it is counted.
            write_document(self._store, f"{place}/{WHOLE}", failure(cause))
            if self._step:
                raise _WholeWanted(cause)

        fetch_adapter(self._store, work, self._client, home, adapter, take_whole)

    def _is_in_time(self, order: OrderDocument) -> bool:
        now = self._ear.order()
        return now is not None and now.attempt_id == order.attempt_id and now.is_open


def _what_is_asked(order: OrderDocument) -> str:
    steps = order.training.max_steps
    said = "training" if steps is None else f"training, {steps} step{'s' if steps > 1 else ''}"
    if order.closes_at is None:
        return said
    return f"{said}; the round closes in {spell_seconds(order.closes_at - time.time())}"
