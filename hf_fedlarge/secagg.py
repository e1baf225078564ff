"""Secure aggregation: the server learns the sum of the clients' vectors, and of none alone (Bonawitz et al. 2017).

The protocol of "Practical Secure Aggregation" (doi 10.1145/3133956.3133982) as functions without any input or output;
a message is a record. Vectors are of whole numbers modulo 2^32, and a round goes

    keys     each client advertises two X25519 keys, of which one is for boxes and one for masks
    shares   it splits two secrets among all: what its mask key is made of, and the seed of a mask of its own
    masked   it sends its vector + its own mask ± a mask with every other one, which two clients add and subtract
    reveal   of those whose vector came the server asks for shares of the own seed, of the others for shares of the key

With `threshold` shares of each the server takes the masks off the sum. Nobody's two secrets are ever revealed
both: `reveal` gives one share of each client, and a threshold of more than half keeps two halves of the clients from
being asked for different ones. A vector that comes after its sender's key was given up still has its own mask.

Keys are fresh in every attempt at a round, so a mask is used once as long as a client masks one vector in it. Secrets
have 128 bits, and a reconstructed one is checked against what its client advertised. `fixed_point.py` has the vectors.

Before it reveals anything, a client that has everybody's keys wants the list of survivors signed by `threshold` of them
(`agreement.py`); without, a server can tell each another one (docs/privacy.md). Left out: a graph of neighbours in
place of all pairs (Bell et al. 2020), which pays from some hundreds of clients on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from typing import Annotated, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from hf_fedlarge.ciphers import (
    KEY_BYTES,
    SEALED_BYTES,
    SECRET_BYTES,
    add_keystream,
    agreed,
    combine,
    derived,
    public_key,
    seal,
    split,
    unseal,
)
from hf_fedlarge.config import ClientName
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.keys import AllowedKeys, PrivateKey, Signature, sign
from hf_fedlarge.records import Record

_Key = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * KEY_BYTES}}}$")]
_Secret = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SECRET_BYTES}}}$")]
_Box = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * (2 * SECRET_BYTES + SEALED_BYTES)}}}$")]
_SIGNED = b"hf-fedlarge secure keys v1\n"


# Messages


class Secrets(Record):
    """What a client keeps to itself in an attempt, as hexadecimal digits: never sent, and of no use afterwards.

    `box` is a private key of X25519; `mask` is what its mask key is made of, and `seed` what its own mask is.
    """

    box: _Key
    mask: _Secret
    seed: _Secret

    @property
    def mask_key(self) -> bytes:
        """Its private key for masks."""
        return _mask_key(bytes.fromhex(self.mask))


class Keys(Record):
    """What a client advertises: its public keys for boxes and masks, and a commitment to its own mask's seed.

    `signature` is of all else and of the attempt, by the client's key in `keys.py`.
    """

    client: ClientName
    box: _Key
    mask: _Key
    commitment: _Key
    signature: Signature | None = None

    def signed(self, context: str) -> bytes:
        """What its signature is of."""
        body = self.model_dump(mode="json", exclude={"signature"}) | {"context": context}
        return _SIGNED + _canonical(body)


class Roster(Record):
    """Who takes part in an attempt, and how many shares give a secret; `context` says which attempt it is."""

    context: Annotated[str, Field(max_length=200)]
    threshold: int
    clients: Annotated[list[Keys], Field(min_length=2)]

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        names = self.names
        if names != sorted(set(names)):
            raise ValueError("its clients are not in order, each once")
        if not len(names) / 2 < self.threshold <= len(names):
            raise ValueError(
                f"its threshold is {self.threshold} of {len(names)} clients; expected more than half, and at most all"
            )
        return self

    @property
    def names(self) -> list[str]:
        """The clients', in order."""
        return [keys.client for keys in self.clients]

    @property
    def digest(self) -> str:
        """SHA-256 of its canonical JSON."""
        return hashlib.sha256(_canonical(self.model_dump(mode="json"))).hexdigest()

    def of(self, client: str) -> Keys:
        """A client's keys."""
        return self.clients[self.names.index(client)]


class Shares(Record):
    """Boxes with a share of each of two secrets: from one client by recipient, or for one client by sender."""

    boxes: dict[ClientName, _Box]


class Revealed(Record):
    """The shares that a client gives up: of survivors' seeds, and of the mask keys of those who were lost."""

    seeds: dict[ClientName, _Secret]
    masks: dict[ClientName, _Secret]


class Recovered(NamedTuple):
    """The secrets that shares gave: survivors' seeds, and the lost ones' private mask keys."""

    seeds: dict[str, bytes]
    mask_keys: dict[str, bytes]


# The client's side


def new_secrets() -> Secrets:
    """Fresh secrets, for one attempt."""
    box, mask, seed = (os.urandom(count).hex() for count in (KEY_BYTES, SECRET_BYTES, SECRET_BYTES))
    return Secrets(box=box, mask=mask, seed=seed)


def advertised(client: str, secrets: Secrets, context: str, key: PrivateKey | None = None) -> Keys:
    """The public half of a client's secrets; `key` signs it."""
    keys = Keys(
        client=client,
        box=public_key(bytes.fromhex(secrets.box)).hex(),
        mask=public_key(secrets.mask_key).hex(),
        commitment=_commitment(bytes.fromhex(secrets.seed)),
    )
    return keys.model_copy(update={"signature": sign(key, keys.signed(context))}) if key else keys


def check_roster(
    roster: Roster, client: str, secrets: Secrets, context: str, allowed: AllowedKeys | None = None
) -> None:
    """Check that a client can share its secrets among these.

    Args:
        roster: as the server published it.
        client, secrets: its own.
        context: which attempt it must be for.
        allowed: the list of keys that everybody must have signed with; None: whoever made the roster is believed.

    Raises:
        ArtifactError: it is for another attempt, has other keys than the client's own, or some that aren't signed.
    """
    if roster.context != context:
        raise ArtifactError(f"The roster is for {roster.context}; expected {context}.")
    own = advertised(client, secrets, context)
    if client not in roster.names or roster.of(client).signed(context) != own.signed(context):
        raise ArtifactError(f"The roster of {context} has other keys of {client} than it advertised.")
    if allowed:
        check_signatures(roster.clients, context, allowed)


def check_keys(keys: Keys) -> None:
    """Check that others can agree with a client's keys.

    Raises:
        ArtifactError: with one of them all agree on the same, which X25519 refuses: every peer would fail.
    """
    for public in (keys.box, keys.mask):
        agreed(os.urandom(KEY_BYTES), bytes.fromhex(public), b"a check")


def check_signatures(clients: Collection[Keys], context: str, allowed: AllowedKeys) -> None:
    """Check that clients' keys are signed by them.

    Raises:
        ArtifactError: one is not, by nobody or by a key that isn't allowed.
    """
    for keys in clients:
        try:
            if keys.signature is None:
                raise ArtifactError("they are not signed; expected a signature by a key of its own: join with --key.")
            allowed.check_signed(keys.client, keys.signed(context), keys.signature, "these keys")
        except ArtifactError as error:
            raise ArtifactError(f"{keys.client}'s keys are refused: {error}") from error


def shared(secrets: Secrets, roster: Roster, client: str) -> Shares:
    """A client's secrets in shares, one of each for every client, itself among them, in a box that only it can open."""
    count, digest = len(roster.clients), roster.digest
    halves = [split(bytes.fromhex(secret), roster.threshold, count) for secret in (secrets.seed, secrets.mask)]
    boxes = {}
    for keys, seed, mask in zip(roster.clients, *halves, strict=True):
        key, about = _box(secrets, keys, digest, client, keys.client)
        boxes[keys.client] = seal(key, seed + mask, about).hex()
    return Shares(boxes=boxes)


def opened(secrets: Secrets, roster: Roster, client: str, boxes: Mapping[str, str]) -> dict[str, tuple[bytes, bytes]]:
    """Sender → its shares of seed and mask key.

    Raises:
        ArtifactError: a box is not what its sender sealed for this client in this attempt.
    """
    found, digest = {}, roster.digest
    for sender, box in boxes.items():
        key, about = _box(secrets, roster.of(sender), digest, sender, client)
        try:
            content = unseal(key, bytes.fromhex(box), about)
        except ArtifactError as error:
            raise ArtifactError(f"The shares of {sender} for {client} are refused: {error}") from error
        found[sender] = content[:SECRET_BYTES], content[SECRET_BYTES:]
    return found


def add_masks(words: np.ndarray, secrets: Secrets, roster: Roster, client: str, sharers: Collection[str]) -> None:
    """Mask a client's vector.

    Args:
        words: uint32; changed in place.
        secrets, roster, client: of the attempt.
        sharers: those whose shares reached the others, this client among them.

    Raises:
        ArtifactError: too few, or not this client; or a key that nobody can agree with.
    """
    _check_names(roster, sharers, roster.names, "sharers")
    if client not in sharers:
        raise ArtifactError(f"{client} is to mask a vector without being among those whose shares came.")
    add_keystream(words, _own_mask(bytes.fromhex(secrets.seed), roster), 1)
    for other in sharers:
        if other != client:
            add_keystream(words, _pair_mask(secrets.mask_key, roster, other), 1 if client < other else -1)


def revealed(
    shares: Mapping[str, tuple[bytes, bytes]], roster: Roster, client: str, survivors: Collection[str]
) -> Revealed:
    """What a client gives up for the sum: of each sharer one share of one secret. It must be asked once an attempt.

    Args:
        shares: as `opened` gave them, of all sharers.
        roster, client: of the attempt.
        survivors: those whose vectors came.

    Raises:
        ArtifactError: too few survivors, none of the sharers, or not this client: nothing is revealed.
    """
    _check_names(roster, survivors, shares, "survivors")
    if client not in survivors:
        raise ArtifactError(f"{client} is asked for shares without being among those whose vectors came.")
    return Revealed(
        seeds={name: seed.hex() for name, (seed, _) in shares.items() if name in survivors},
        masks={name: mask.hex() for name, (_, mask) in shares.items() if name not in survivors},
    )


# The server's side


def threshold_of(share: float, count: int) -> int:
    """How many shares give a secret: more than this share of the clients, and never fewer than two."""
    return max(2, int(share * count + 1e-9) + 1)


def delivered(sent: Mapping[str, Shares]) -> dict[str, Shares]:
    """Recipient → its boxes by sender, of what the sharers sent; those who sent nothing get nothing."""
    return {name: Shares(boxes={sender: shares.boxes[name] for sender, shares in sent.items()}) for name in sent}


def check_shares(shares: Shares, roster: Roster) -> None:
    """That there is a box for everybody.

    Raises:
        ArtifactError: for others than the roster's clients.
    """
    if sorted(shares.boxes) != roster.names:
        raise ArtifactError(f"it has boxes for {len(shares.boxes)} clients; expected one for each of the roster's.")


def check_revealed(message: Revealed, sharers: Collection[str], survivors: Collection[str]) -> None:
    """That there is a share of each sharer, and of the one secret that was asked for.

    Raises:
        ArtifactError: of others, or of the other secret.
    """
    if set(message.seeds) != set(survivors) or set(message.masks) != set(sharers) - set(survivors):
        raise ArtifactError("it has other shares than were asked for.")


def recovered(
    roster: Roster, sharers: Collection[str], survivors: Collection[str], messages: Mapping[str, Revealed]
) -> Recovered:
    """The secrets that take the masks off: of `threshold` clients' shares, and each what its client advertised.

    Raises:
        ArtifactError: too few messages, or what they give isn't what was advertised.
    """
    if len(messages) < roster.threshold:
        raise ArtifactError(
            f"{len(messages)} clients revealed shares; {roster.threshold} are needed, and fewer say nothing."
        )
    used = sorted(messages)[: roster.threshold]

    def secret(kind: str, name: str) -> bytes:
        shares = {roster.names.index(by): bytes.fromhex(getattr(messages[by], kind)[name]) for by in used}
        return combine(shares)

    def checked(value: bytes, public: str, expected: str, name: str) -> bytes:
        if public != expected:
            raise ArtifactError(
                f"The shares of {name} don't give what it advertised: it, or one of {', '.join(used)}, sent wrong ones."
            )
        return value

    seeds, mask_keys = {}, {}
    for name in sorted(survivors):
        seed = secret("seeds", name)
        seeds[name] = checked(seed, _commitment(seed), roster.of(name).commitment, name)
    for name in sorted(set(sharers) - set(survivors)):
        key = _mask_key(secret("masks", name))
        mask_keys[name] = checked(key, public_key(key).hex(), roster.of(name).mask, name)
    return Recovered(seeds, mask_keys)


def remove_masks(total: np.ndarray, roster: Roster, survivors: Collection[str], secrets: Recovered) -> None:
    """Take the masks off the sum of the survivors' vectors, in place."""
    for seed in secrets.seeds.values():
        add_keystream(total, _own_mask(seed, roster), -1)
    for lost, key in secrets.mask_keys.items():
        for name in survivors:
            add_keystream(total, _pair_mask(key, roster, name), -1 if name < lost else 1)


# Keys and masks


def _mask_key(secret: bytes) -> bytes:
    return derived(secret, b"hf-fedlarge mask key v1")


def _commitment(seed: bytes) -> str:
    return hashlib.sha256(b"hf-fedlarge seed v1" + seed).hexdigest()


def _own_mask(seed: bytes, roster: Roster) -> bytes:
    return derived(seed, b"hf-fedlarge own mask v1 " + roster.context.encode())


def _pair_mask(private: bytes, roster: Roster, other: str) -> bytes:
    public = bytes.fromhex(roster.of(other).mask)
    return agreed(private, public, b"hf-fedlarge pair mask v1 " + roster.context.encode())


def _box(secrets: Secrets, other: Keys, roster: str, sender: str, recipient: str) -> tuple[bytes, bytes]:
    """The key of a box, and what it is about; `roster` is the roster's digest."""
    about = f"hf-fedlarge shares v1 {roster} {sender} {recipient}".encode()
    return agreed(bytes.fromhex(secrets.box), bytes.fromhex(other.box), about), about


def _check_names(roster: Roster, names: Collection[str], among: Collection[str], what: str) -> None:
    known = set(names) & set(among)
    if len(known) < max(len(names), roster.threshold):
        raise ArtifactError(
            f"The {what} are {len(known)} known clients of {len(names)}; expected known ones, each once, at least "
            f"{roster.threshold}: with fewer nothing is masked or revealed."
        )


def _canonical(body: dict[str, object]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
