"""That clients were told the same survivors, before one reveals a share (Bonawitz et al. 2017, the consistency check).

A client signs what the server tells it of an attempt: the roster, the sharers, the survivors. The server passes the
signatures on, and a client reveals shares for a list alone that a quorum of the roster's clients has signed: the
threshold, and more than two thirds, whatever threshold the server chose. Each signs one list in an attempt. So for two
lists to have that, more than a third of the clients must have signed both, which no honest one does.

Who a signature is of is what the client's own list of keys says (`keys.AllowedKeys`): the server can't make one up, nor
take one of another attempt, whose context and fresh keys are in what is signed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from hf_fedlarge.config import ClientName
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.keys import AllowedKeys, PrivateKey, Signature, sign
from hf_fedlarge.records import Record
from hf_fedlarge.secagg import Roster

_SIGNED = b"hf-fedlarge secure survivors v1\n"


class Agreed(Record):
    """A client's signature of what it was told."""

    signature: Signature


class Agreement(Record):
    """All of these that the server has, by client."""

    signatures: dict[ClientName, Signature]


def is_signed(roster: Roster) -> bool:
    """Whether clients can agree: each has a key of its own, which signed what it advertised."""
    return all(keys.signature for keys in roster.clients)


def quorum(roster: Roster) -> int:
    """How many clients have to come through an attempt: where they can agree, as many as have to."""
    return max(roster.threshold, 2 * len(roster.clients) // 3 + 1) if is_signed(roster) else roster.threshold


def agreed(client: str, key: PrivateKey, roster: Roster, sharers: Sequence[str], survivors: Sequence[str]) -> Agreed:
    """What a client says to the survivors that it was told. It must say it to one list in an attempt."""
    return Agreed(signature=sign(key, _content(client, roster, sharers, survivors)))


def check_agreed(
    client: str,
    signature: Signature,
    roster: Roster,
    sharers: Sequence[str],
    survivors: Sequence[str],
    allowed: AllowedKeys,
) -> None:
    """Check that one of the survivors signed this.

    Raises:
        ArtifactError: it is not one of them, its key isn't allowed, or the signature is of something else.
    """
    if client not in survivors:
        raise ArtifactError(f"{client} signs for survivors that it is not among.")
    allowed.check_signed(client, _content(client, roster, sharers, survivors), signature, "these survivors")


def check_agreement(
    agreement: Agreement, roster: Roster, sharers: Sequence[str], survivors: Sequence[str], allowed: AllowedKeys
) -> None:
    """Check that enough clients were told what this one was.

    Args:
        agreement: as the server passed it on; signatures that aren't good for this don't count.
        roster, sharers, survivors: what this client was told.
        allowed: its list of everybody's keys.

    Raises:
        ArtifactError: fewer good signatures than a quorum; nothing may be revealed.
    """
    problems = []
    for client, signature in agreement.signatures.items():
        try:
            check_agreed(client, signature, roster, sharers, survivors, allowed)
        except ArtifactError as error:
            problems.append(f"{client}: {error}")
    good = len(agreement.signatures) - len(problems)
    if good < quorum(roster):
        raise ArtifactError(
            f"{good} clients signed the survivors that this one was told; expected {quorum(roster)} at least, or "
            "the server may have told others otherwise: nothing is revealed. " + " ".join(problems[:3])
        )


def _content(client: str, roster: Roster, sharers: Sequence[str], survivors: Sequence[str]) -> bytes:
    body = {
        "client": client,
        "context": roster.context,
        "roster": roster.digest,
        "sharers": sorted(sharers),
        "survivors": sorted(survivors),
    }
    return _SIGNED + json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
