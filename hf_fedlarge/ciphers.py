"""What secure aggregation is built of, in bytes: key agreement, key derivation, a keystream, sealed boxes, shares.

X25519 (RFC 7748), HKDF with SHA-256 (RFC 5869), ChaCha20 (RFC 8439), AES-GCM with 256 bits (SP 800-38D), and Shamir's
secret sharing over GF(2^128) (doi 10.1145/359168.359176). All of them are libraries': `cryptography`, which only
this module and `keys.py` (signatures) import, and pycryptodome, which only this one does. `secagg.py` has the protocol.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hf_fedlarge.errors import ArtifactError, ConfigError

SECRET_BYTES = 16  # of a secret that can be shared, and of each share
KEY_BYTES = 32  # of X25519 keys, both halves
_NONCE_BYTES = 12
_TAG_BYTES = 16
SEALED_BYTES = _NONCE_BYTES + _TAG_BYTES  # what a box is longer than what is in it
_CHUNK_BYTES = 4 * 2**20


def derived(secret: bytes, purpose: bytes) -> bytes:
    """32 bytes that say nothing about `secret`, nor about those derived of it for another purpose."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=purpose).derive(secret)


def public_key(private: bytes) -> bytes:
    """The public half of an X25519 key; any 32 bytes are a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes, purpose: bytes) -> bytes:
    """32 bytes that the owners of two keys, and nobody else, can derive for a purpose.

    Raises:
        ArtifactError: `public` is one of the few values that agree on the same with everybody.
    """
    try:
        secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ArtifactError(f"the key {public.hex()} is none that anybody can agree with.") from error
    return derived(secret, purpose)


def add_keystream(words: np.ndarray, key: bytes, sign: int) -> None:
    """Add the keystream of a key to uint32 `words`, or subtract it, modulo 2^32 and in place; a key is for one use."""
    assert words.dtype == np.uint32
    assert sign in (-1, 1)
    # The nonce may be what it likes: of a key there is one stream. It has 2^32 blocks of 64 bytes.
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    zeros = bytes(min(_CHUNK_BYTES, words.nbytes))
    for start in range(0, words.nbytes, _CHUNK_BYTES):
        part = words[start // 4 : (start + _CHUNK_BYTES) // 4]
        stream = np.frombuffer(encryptor.update(zeros[: part.nbytes]), dtype="<u4")
        (np.add if sign > 0 else np.subtract)(part, stream, out=part)


def seal(key: bytes, content: bytes, about: bytes) -> bytes:
    """`content` encrypted so that nobody without the key can read it, change it, or use it about something else."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """What was sealed.

    Raises:
        ArtifactError: not with this key, or about something else, or it was changed since.
    """
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], about)
    except (InvalidTag, ValueError) as error:
        raise ArtifactError("the box is not what was sealed with this key.") from error


def check_that_secrets_can_be_shared() -> None:
    """Before anything is made.

    Raises:
        ConfigError: pycryptodome is not installed.
    """
    try:
        import Crypto.Protocol.SecretSharing  # noqa: F401
    except ImportError as error:
        raise ConfigError("secure needs pycryptodome; install it with pip install pycryptodome.") from error


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """`count` shares of 16 bytes; any `threshold` of them give it, fewer say nothing about it."""
    from Crypto.Protocol.SecretSharing import Shamir

    return [share for _, share in Shamir.split(threshold, count, secret)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of exactly as many shares as its threshold is, by where they stood in `split`'s list.

    A wrong share makes a wrong secret; whoever combines has to know what else to hold it against.
    """
    from Crypto.Protocol.SecretSharing import Shamir

    return Shamir.combine([(index + 1, share) for index, share in shares.items()])
