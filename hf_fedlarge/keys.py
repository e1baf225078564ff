"""Who wrote an update: Ed25519 signatures (RFC 8032), and the list of the keys that a server allows each client.

    hf-fedlarge keys new lab-3 --output keys            # the client: keys/lab-3.pem stays there, the line is sent
    hf-fedlarge keys allow allowed.json "ed25519 lab-3 …"                 # the server, where lab-3 is known
    hf-fedlarge keys revoke allowed.json lab-3          # refused from now on, whatever the round; allow a new one then

Signed is `PREFIX` and the canonical JSON that an update's digest is taken of, so a signature binds the client's name,
the round, the digests of package and adapter, the settings, the counts, and the SHA-256 of every file. No id of the run
is needed beside them: the adapter's digest covers the digests of every update that went into it and of the adapter
before, back to the run's first. Two runs that began alike are told apart from their first differing round on; until
then what a client would have to compute is the same in both. `measured` is not signed: it comes from one machine, and
only how fast a client seems (the selection `resources`) and what is reported depend on it, never an aggregate.

Revoked means refused when it arrives, whatever round the update names: whoever stole a key can write any round. What
a server accepted before stays accepted. Left out: passphrases, expiry, certificates. A list of tens of lines is read
by a person.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from filelock import FileLock
from pydantic import Field, TypeAdapter, ValidationError

from hf_fedlarge.artifacts import ClientName, UpdateManifest, write_json
from hf_fedlarge.config import Record, checked, first_problem
from hf_fedlarge.errors import ArtifactError, ConfigError, OutputError
from hf_fedlarge.untrusted import read_json

SIGNATURE_NAME = "signature.json"
MAX_SIGNATURE_BYTES = 2**12
MAX_LIST_BYTES = 16 * 2**20
# Signatures of these keys mean nothing under another prefix, and nothing else that may be signed begins like this.
PREFIX = b"hf-fedlarge update v1\n"

PrivateKey = Ed25519PrivateKey
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Signature(Record):
    """What `signature.json` holds: which key signed, and the signature, in hexadecimal digits."""

    algorithm: Literal["ed25519"] = "ed25519"
    key: Fingerprint
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class ListedKey(Record):
    """One public key of a client, and since when it is what it is (UTC)."""

    public: PublicKey
    state: Literal["allowed", "revoked"]
    since: Annotated[str, Field(max_length=40)]

    @property
    def fingerprint(self) -> str:
        """What people call the key by."""
        return fingerprint(self.public)


class AllowedKeys(Record):
    """An allow-list: client → its keys, oldest first."""

    clients: dict[ClientName, list[ListedKey]] = {}

    def check(self, manifest: UpdateManifest, signature: Signature | None) -> None:
        """Check that a key which is allowed for the manifest's client signed this very manifest.

        Raises:
            ArtifactError: not signed, by an unknown or revoked key, or the signature is of something else.
        """
        client = manifest.client
        if signature is None:
            raise ArtifactError(
                f"it has no {SIGNATURE_NAME}; expected a signature by a key that is allowed for {client}: train with "
                "--key."
            )
        what = f"this manifest; expected one of the digest {manifest.digest[:12]}…"
        self.check_signed(client, PREFIX + manifest.canonical, signature, what)

    def check_signed(self, client: str, content: bytes, signature: Signature, what: str) -> None:
        """Check that a key which is allowed for a client signed `content`, which errors call `what`.

        Raises:
            ArtifactError: an unknown or revoked key, or the signature is of something else.
        """
        listed = {key.fingerprint: key for key in self.clients.get(client, [])}
        key = listed.get(signature.key)
        if key is None:
            known = ", ".join(name for name, other in listed.items() if other.state == "allowed") or "none yet"
            raise ArtifactError(
                f"it is signed with the key {signature.key}, which is not one of {client}'s; expected {known}: sign "
                "with that, or let the operator allow this one."
            )
        if key.state == "revoked":
            raise ArtifactError(
                f"it is signed with {client}'s key {signature.key}, which is revoked since {key.since}; sign with a "
                "new key that the operator allows."
            )
        if not is_signed(key.public, content, signature):
            raise ArtifactError(f"its signature by the key {signature.key} is not of {what}: send it as it was signed.")


# The client's side


def new_key(path: Path, client: str) -> str:
    """Make a key; the file is readable by its owner alone, and no file that is there is touched.

    Args:
        path: of the private key, as PEM (PKCS 8, without a passphrase).
        client: whose.

    Returns:
        The line that the server's operator gives to `allow`.

    Raises:
        ConfigError: a name that no client can have.
        OutputError: `path` exists already.
        OSError: it can't be written.
    """
    client = _client_name(client)
    key = Ed25519PrivateKey.generate()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise OutputError(f"{path} exists already, and a key is never replaced; choose another name.") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        os.fsync(file.fileno())
    return f"ed25519 {client} {key.public_key().public_bytes_raw().hex()}"


def read_key(path: Path) -> PrivateKey:
    """A client's private key.

    Raises:
        ConfigError: `path` is missing or holds something else.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; expected a key made by `hf-fedlarge keys new`.")
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no private key as PEM; expected one made by `hf-fedlarge keys new`.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds {type(key).__name__}; expected an Ed25519 key: `hf-fedlarge keys new`.")
    return key


def sign_update(directory: Path, manifest: UpdateManifest, key: PrivateKey) -> None:
    """Write the signature of `manifest` beside it; its digest stays what it was."""
    write_json(directory / SIGNATURE_NAME, sign(key, PREFIX + manifest.canonical).model_dump(mode="json"))


def sign(key: PrivateKey, content: bytes) -> Signature:
    """A signature of `content`, which begins with a prefix of its own kind."""
    name = fingerprint(key.public_key().public_bytes_raw().hex())
    return Signature(key=name, signature=key.sign(content).hex())


def is_signed(public: PublicKey, content: bytes, signature: Signature) -> bool:
    """Whether the key that goes with `public` signed `content`."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature.signature), content)
    except InvalidSignature:
        return False
    return True


def read_signature(directory: Path) -> Signature | None:
    """An update's signature, of which only the form was checked; None where it has none.

    Raises:
        ArtifactError: not a regular file, too large, or not a signature.
        OSError: the system can't read it.
    """
    path = directory / SIGNATURE_NAME
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{path} is not a regular file.")
    try:
        return Signature.model_validate(read_json(path, MAX_SIGNATURE_BYTES))
    except ValidationError as error:
        raise ArtifactError(f"{path} is not a signature: {first_problem(error)}.") from error


# The server's side


def read_allowed(path: Path) -> AllowedKeys:
    """An allow-list.

    Raises:
        ConfigError: it is missing or holds something else.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; expected a list of keys made by `hf-fedlarge keys allow`.")
    try:
        raw = read_json(path, MAX_LIST_BYTES)
    except ArtifactError as error:
        raise ConfigError(f"{error}") from error
    return checked(AllowedKeys, raw, str(path))


def allow(path: Path, line: str) -> ListedKey:
    """Add a client's key to the list at `path`, which is made if it isn't there; its other keys stay what they are.

    Args:
        path: the list.
        line: as `new_key` gave it: `ed25519 NAME KEY`.

    Raises:
        ConfigError: another kind of line, or the key is listed already, revoked or for another client.
    """
    words = line.split()
    if len(words) != 3 or words[0] != "ed25519":
        raise ConfigError(f"{line!r:.200} is not a key; expected the line that `hf-fedlarge keys new` printed.")
    client = _client_name(words[1])
    key = checked(ListedKey, {"public": words[2], "state": "allowed", "since": _now()}, "The key")
    with _changing(path) as clients:
        for name, keys in clients.items():
            for other in keys:
                if other.public == key.public:
                    raise ConfigError(
                        f"{path} has the key {key.fingerprint} already, {other.state} for {name} since {other.since}; "
                        "make a new one with `hf-fedlarge keys new`."
                    )
        clients[client] = [*clients.get(client, []), key]
    return key


def revoke(path: Path, client: str, fingerprint: str | None = None) -> list[ListedKey]:
    """Revoke one of a client's keys, or all that are allowed; a revoked key is never allowed again.

    Returns:
        The keys that are revoked now and were not before.

    Raises:
        ConfigError: there is no such allowed key.
    """
    with _changing(path) as clients:
        keys = clients.get(client, [])
        wanted = [key for key in keys if key.state == "allowed" and fingerprint in (None, key.fingerprint)]
        if not wanted:
            which = f"no allowed key {fingerprint}" if fingerprint else "no allowed key"
            raise ConfigError(f"{path} has {which} of {client!r:.200}; `hf-fedlarge keys list` shows what it has.")
        revoked = {key.public: key.model_copy(update={"state": "revoked", "since": _now()}) for key in wanted}
        clients[client] = [revoked.get(key.public, key) for key in keys]
    return list(revoked.values())


def make_allowed(path: Path, keys: dict[str, Path]) -> None:
    """Make a new key for every client, and then the list of them: the simulated clients of a run.

    Without the list nothing was signed yet, so keys that a killed server left behind are made again.

    Args:
        path: the list; where it is there already, nothing is done.
        keys: client → the file of its private key.
    """
    if path.exists():
        return
    clients = {}
    for client, file in keys.items():
        file.unlink(missing_ok=True)
        public = new_key(file, client).split()[2]
        clients[client] = [ListedKey(public=public, state="allowed", since=_now())]
    write_json(path, AllowedKeys(clients=clients).model_dump(mode="json"))


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, list[ListedKey]]]:
    """The list's clients, to be changed within the `with`; written whole at its end, and by one program at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        clients = dict(read_allowed(path).clients) if path.exists() else {}
        yield clients
        write_json(path, AllowedKeys(clients=clients).model_dump(mode="json"))


def fingerprint(public: PublicKey) -> Fingerprint:
    """What people call a key by."""
    return hashlib.sha256(bytes.fromhex(public)).hexdigest()[:16]


def _client_name(name: str) -> str:
    try:
        return TypeAdapter(ClientName).validate_python(name)
    except ValidationError as error:
        raise ConfigError(f"{name!r:.200} can't be a client's name: {first_problem(error)}.") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
