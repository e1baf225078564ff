"""Who may take part in a served federation: the server looks at check-ins, and tells whom it can't take why.

    check_ins/CLIENT.json                    what a client says of itself
    verdicts/check_ins/CLIENT/refused.json   why it can't take part, for it alone; only the server writes it

A note is about one check-in: a client that comes back with another one is not told of what it has mended. Who changes
nothing may still be taken later, as where the federation's file is changed and its server started again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import ClassVar

from pydantic import ValidationError

from hf_fedlarge.config import ClientName
from hf_fedlarge.entries import Digest
from hf_fedlarge.errors import ArtifactError, StoreError
from hf_fedlarge.keys import PrivateKey
from hf_fedlarge.orders import (
    CHECK_INS,
    VERDICTS,
    CheckInDocument,
    Reason,
    RunId,
    Said,
    as_bytes,
    one_line,
    read_document,
    write_document,
)
from hf_fedlarge.plan import CheckIn
from hf_fedlarge.store import Store
from hf_fedlarge.voice import signed

_MAX_CHECK_INS = 10_000
_REFUSALS = f"{VERDICTS}/{CHECK_INS}"


class RefusalDocument(Said):
    """Why a client can't take part; `check_in` is the digest of what it said, None: that is not known."""

    prefix: ClassVar[bytes] = b"hf-fedlarge refusal v1\n"
    run: RunId
    client: ClientName
    check_in: Digest | None = None
    cause: Reason

    def is_about(self, run: str, said: CheckInDocument) -> bool:
        """Whether it answers what a client said of itself in a federation."""
        return (self.run, self.client) == (run, said.client) and self.check_in in (None, _digest(said))

    @property
    def sentence(self) -> str:
        """As it is reported."""
        return f"the server says: {self.client} can't take part: {self.cause}"


def refusal(client: str) -> str:
    """Where a client learns why it can't take part."""
    return f"{_REFUSALS}/{client}/refused.json"


class Admission:
    """Who may take part in a run.

    Args:
        store: where clients check in.
        run: what the run is called in orders.
        key: signs what refused clients are told; None: it is not signed.
        say: reports a line once.

    Raises:
        StoreError: the store can't be written.
    """

    def __init__(self, store: Store, run: str, key: PrivateKey | None, say: Callable[[str], None]) -> None:
        self._store, self._run, self._key, self._say = store, run, key, say
        self._told: dict[str, RefusalDocument] = {}
        store.remove(_REFUSALS)  # of a server that was ended, whose file may have been changed since

    def look(self, declared: dict[str, int] | None, least_bytes: int = 0) -> list[CheckIn]:
        """Who checked in and may take part, among them who has too little memory, as who checks in says.

        Args:
            declared: client → most examples that it is believed to have; None: whoever comes, with any number.
            least_bytes: of memory, that the smallest tier needs; 0: anybody's will do.

        Raises:
            StoreError: the store can't be read; one file in it that can't be keeps its client out alone.
        """
        known = []
        names = self._store.names(CHECK_INS)
        if len(names) > _MAX_CHECK_INS:
            self._say(f"{len(names)} names checked in; {_MAX_CHECK_INS} are looked at, the federation's own first")
            names.sort(key=lambda name: name.removesuffix(".json") not in (declared or ()))
        for name in names[:_MAX_CHECK_INS]:
            client, said, cause = name.removesuffix(".json"), None, None
            try:
                if declared is not None and client not in declared:
                    raise ArtifactError("it is not among the federation's clients")
                said = read_document(self._store, f"{CHECK_INS}/{name}", CheckInDocument)
                if said is None:
                    continue
                if name != f"{said.client}.json":
                    raise ArtifactError(f"it says that it is {said.client}")
                if declared is not None and said.examples > declared[client]:
                    raise ArtifactError(f"it says {said.examples} examples; expected {declared[client]} at most")
            except ArtifactError as error:
                cause = f"{error}"
            except StoreError as error:  # of this one file, such as one that its owner alone may read
                cause = f"its check-in can't be read: {error}"
            else:
                known.append(CheckIn(client, said.examples, said.memory_bytes))
                if said.memory_bytes is not None and said.memory_bytes < least_bytes:
                    cause = f"it says {said.memory_bytes} bytes of memory; expected {least_bytes} at least"
            if cause:
                self._say(f"{client!a:.140} can't take part: {cause}")
            self._tell(client, said, cause)
        return known

    def _tell(self, client: str, said: CheckInDocument | None, cause: str | None) -> None:
        """Leave a client why it can't take part, or take that away again."""
        try:
            if cause is None:
                if client in self._told:
                    self._store.remove(refusal(client))
                    del self._told[client]
                return
            cause = one_line(cause.replace(self._store.url, "the store"))
            note = RefusalDocument(run=self._run, client=client, check_in=said and _digest(said), cause=cause)
            if self._told.get(client) != note:
                write_document(self._store, refusal(client), signed(note, self._key))
                self._told[client] = note
        except ValidationError:
            return  # no client has such a name
        except StoreError as error:
            self._say(f"{client!a:.140} can't be told that it can't take part: {error}")


def _digest(said: CheckInDocument) -> str:
    return hashlib.sha256(as_bytes(said)).hexdigest()
