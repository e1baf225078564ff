"""What the server says: signed with its key, and heard by clients that were told which key that is.

    hf-fedlarge keys new server --output keys       # keys/server.pem stays there; clients are told the 64 digits
    hf-fedlarge serve … --key keys/server.pem       hf-fedlarge join … --server-key 437a66…

A signature is of all that an order or a verdict says, with the run, the round and the attempt, and whatever an order
names by digest is bound with it: packages, adapters, and the keys of secure aggregation. What was signed once can be
shown again, also at another place, so a client writes down which federation it takes part in and how far that was, and
takes no other's order until it is over, and no older one. What it can't know is that there is a newer one, which
somebody withholds; a deadline bounds that.

A key is replaced where clients were given a list in place of digits: they read it anew for every order, so a new key
is allowed there, the server goes on with it, and the old one is revoked. No key says by itself which comes after it:
whoever stole it could say that, too.

    hf-fedlarge keys allow server.json "ed25519 server 437a66…"     hf-fedlarge join … --server-key server.json
    hf-fedlarge keys revoke server.json server --key FINGERPRINT    # the old one

Without a key a server is who may write the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from hf_fedlarge.artifacts import write_json
from hf_fedlarge.errors import ArtifactError, ConfigError
from hf_fedlarge.keys import ListedKey, PrivateKey, PublicKey, is_signed, read_allowed, sign
from hf_fedlarge.orders import ORDER, OrderDocument, Said, VerdictDocument, read_document, verdict
from hf_fedlarge.store import Store

SaidT = TypeVar("SaidT", bound=Said)
SENT = "sent.json"
SERVER = "server"  # what its keys are under in a list
_HEARD = "heard.json"
DEFAULT_CACHE = Path.home() / ".cache" / "hf_fedlarge"


def signed(said: SaidT, key: PrivateKey | None) -> SaidT:
    """With the signature of a server's key, or without one."""
    return said.model_copy(update={"signature": key and sign(key, said.signed_bytes)})


def server_keys(given: str) -> list[ListedKey]:
    """The keys of a server, as a client was given them, revoked ones among them.

    Args:
        given: one public key in 64 hexadecimal digits, or the path of a list that has keys of `server`.

    Raises:
        ConfigError: neither of them, or no key in the list is allowed.
    """
    try:
        return [ListedKey(public=TypeAdapter(PublicKey).validate_python(given), state="allowed", since="")]
    except ValidationError as error:
        if not Path(os.path.expanduser(given)).is_file():
            raise ConfigError(
                f"--server-key is {given!a:.100}; expected the 64 hexadecimal digits at the end of what `hf-fedlarge "
                "keys new` printed for the server, or the file of a list that `hf-fedlarge keys allow` put them into."
            ) from error
    keys = read_allowed(Path(given)).clients.get(SERVER, [])
    if not any(key.state == "allowed" for key in keys):
        raise ConfigError(
            f"{given} (--server-key) has no allowed key of {SERVER}; expected one: `hf-fedlarge keys allow` it there."
        )
    return keys


def check_said(said: Said, server: Sequence[ListedKey], where: str) -> None:
    """Check that one of the server's keys signed what was found at `where`.

    Raises:
        ArtifactError: it is not signed, or with another or a revoked key, or the signature is of something else.
    """
    names = " or ".join(key.fingerprint for key in server if key.state == "allowed")
    expected = f"the server's key {names} (--server-key)"
    if said.signature is None:
        raise ArtifactError(f"{where} is not signed; expected a signature by {expected}: the server has to use --key.")
    key = next((key for key in server if key.fingerprint == said.signature.key), None)
    if key is None or key.state == "revoked":
        since = "" if key is None else f", which is revoked since {key.since}"
        raise ArtifactError(
            f"{where} is signed with the key {said.signature.key}{since}; expected {expected}: ask the server's "
            "operator."
        )
    if not is_signed(key.public, said.signed_bytes, said.signature):
        raise ArtifactError(
            f"{where} was changed after it was signed, or signed by another; expected what {expected} signed: ask the "
            "server's operator who can write there."
        )


class Ear:
    """What a client hears of a server.

    Args:
        store: where the server is met.
        client: this client's name.
        cache: where its unfinished work is kept.
        server: the server's public key, or a list of its keys (`server_keys`), which must have signed what it says;
            None: whatever is there is believed.
        report: told in a line what became of updates.

    Raises:
        ConfigError: `server` is neither.
    """

    def __init__(
        self, store: Store, client: str, cache: Path, server: str | None, report: Callable[[str], None]
    ) -> None:
        if server is not None:
            server_keys(server)
        self._store, self._client, self._server, self._report = store, client, server, report
        self._clients = cache / "clients"
        self._unbelieved: set[str] = set()

    def home(self, order: OrderDocument) -> Path:
        """Where what this client does in a federation is kept."""
        return self._clients / order.run / self._client

    def order(self) -> OrderDocument | None:
        """What the server asks for now; None: nothing yet.

        Raises:
            ArtifactError: it can't be read, is not the server's, is older than what was heard before, or is another
                federation's while the one that was heard here isn't over.
            StoreError: the store can't be read.
        """
        order = read_document(self._store, ORDER, OrderDocument)
        if order is not None and self._server is not None:
            keys = server_keys(self._server)
            check_said(order, keys, f"{self._store.url}/{ORDER}")
            if order.state != "closed":  # then it asks for nothing
                newest = self._newest(order.run)
                self._check_that_it_is_new(order, newest)
                self._check_that_it_is_of_this_federation(order, keys)
                if newest is None or order.time > newest:
                    path = self.home(order) / _HEARD
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, order.time)
        return order

    def hear(self) -> OrderDocument | None:
        """`order`, and what follows of it: what the server says of updates is reported, and secrets that are not of the
        attempt that is open are forgotten."""
        order = self.order()
        if order is not None:
            for sent in sorted(self.home(order).glob(f"[0-9]*/{SENT}")):
                self._hear_verdict(order, sent)
            for secrets in self.home(order).glob("[0-9]*/secure"):
                if _are_done_with(secrets, order):
                    shutil.rmtree(secrets)
        return order

    def _newest(self, run: str) -> tuple[int, bool, int, int] | None:
        """The time of the newest order that was heard in a federation."""
        path = self._clients / run / self._client / _HEARD
        return tuple(json.loads(path.read_text())) if path.exists() else None

    def _check_that_it_is_new(self, order: OrderDocument, newest: tuple[int, bool, int, int] | None) -> None:
        if newest is not None and order.time < newest:
            raise ArtifactError(
                f"{self._store.url}/{ORDER} is an old one, for round {order.round}, attempt {order.attempt}; expected "
                f"none before round {newest[0]}, attempt {newest[2]}, which was heard of already: have the server "
                f"publish its own again, or, if its run was set back, remove {_HEARD} from this client's cache."
            )

    def _check_that_it_is_of_this_federation(self, order: OrderDocument, keys: Sequence[ListedKey]) -> None:
        """A server's key may sign for several federations, of which only one is met with it in one place.

        What was met goes over from the keys that are allowed to one that comes after them.
        """
        where = [f"{key.public} {self._store.url}" for key in keys if key.state == "allowed"]
        digests = [hashlib.sha256(one.encode()).hexdigest() for one in where]
        paths = [self._clients / f".{self._client}.{digest[:16]}.json" for digest in digests]
        for path in paths:
            before = json.loads(path.read_text()) if path.exists() else None
            if before not in (None, order.run) and not ((newest := self._newest(before)) and newest[1]):
                raise ArtifactError(
                    f"{self._store.url}/{ORDER} is of the federation {order.run}; expected one of {before}, which "
                    f"{self._client} takes part in there and which is not over: have each federation's server use a "
                    f"key of its own, or, if the former one was given up, remove {path}."
                )
        for path in paths:
            if not path.exists() or json.loads(path.read_text()) != order.run:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, order.run)

    def _hear_verdict(self, order: OrderDocument, sent: Path) -> None:
        """Report once what the server says of an update that was sent, also by this client's process before."""
        number, attempt = int(sent.parent.name), json.loads(sent.read_text())["attempt"]
        place = verdict(number, self._client, attempt)
        # What another federation left in the same place is not about this update.
        about = (order.run, self._client, number, attempt)
        said = self.said(
            place,
            VerdictDocument,
            lambda said: (said.run, said.client, said.round, said.attempt) == about,
            f"round {number}: what the server says of the update",
        )
        if said is not None:
            self._report(said.sentence)
            sent.unlink()

    def said(self, path: str, kind: type[SaidT], is_meant: Callable[[SaidT], bool], what: str) -> SaidT | None:
        """What the server left for this client at `path`; None: nothing, what is not meant, or what can't be read.

        The last is reported once, as of `what`: whoever left that, the server may yet say something.

        Raises:
            StoreError: the store can't be read.
        """
        try:
            said = read_document(self._store, path, kind)
            if said is None or not is_meant(said):
                return None
            if self._server is not None:
                check_said(said, server_keys(self._server), f"{self._store.url}/{path}")
        except ArtifactError as error:
            problem = f"{what} can't be read: {error}"
            if problem not in self._unbelieved:
                self._unbelieved.add(problem)
                self._report(problem)
            return None
        return said


def _are_done_with(secrets: Path, order: OrderDocument) -> bool:
    """Whether a round's secrets are of no attempt that an order leaves open."""
    number = int(secrets.parent.name)
    if order.state != "closed":
        return order.state == "over" or number != order.round
    # An old one may be put back, which nothing else follows of.
    return all((order.round, order.attempt) >= (number, int(attempt.stem)) for attempt in secrets.glob("[0-9]*.json"))
