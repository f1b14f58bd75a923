"""Ed25519 signatures (RFC 8032): a coordinator signs plans, a site signs the head of its audit log.

Every signature is over a *purpose* and a message, so that what was signed for one purpose is worth nothing for another.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from common.errors import ConfigError

PREFIX = "ed25519:"

PLAN = "consilium plan v1"
"""Purpose: a coordinator shows a plan."""
AUDIT_HEAD = "consilium audit head v1"
"""Purpose: a site vouches for the length and the last hash of its audit log."""
SEPARATION = "consilium separate populations v1"
"""Purpose: a person of the site states that populations share no persons."""


class SigningKey:
    """A private key, kept in a PEM file (PKCS #8) that its owner alone can read."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @property
    def public(self) -> str:
        """The public key as it is pinned in settings: ``ed25519:`` and base64url of its 32 bytes."""
        return PREFIX + _text(self._key.public_key().public_bytes_raw())

    def sign(self, purpose: str, message: bytes) -> str:
        """The signature of a message for one purpose, base64url."""
        return _text(self._key.sign(_bound(purpose, message)))

    @classmethod
    def fresh(cls) -> SigningKey:
        """A new key that lives in this process alone."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def create(cls, path: Path) -> SigningKey:
        """A new key in a new file (0600), durably.

        Raises:
            ConfigError: the file exists, or cannot be written.
        """
        made = cls.fresh()
        pem = made._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        part = path.with_name(f"{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part.unlink(missing_ok=True)
            with open(part, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
                stream.write(pem)
                stream.flush()
                os.fsync(stream.fileno())
            os.link(part, path)  # whole or not at all, and never in the place of another key
            part.unlink()
        except FileExistsError:
            part.unlink(missing_ok=True)
            raise ConfigError(f"{path}: exists; a key is never overwritten, give another path") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); give another path") from None
        return made

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """The key of a file.

        Raises:
            ConfigError: missing, not an unencrypted Ed25519 key in PEM, or readable by other users.
        """
        try:
            content = path.read_bytes()
            mode = path.stat().st_mode
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a signing key") from None
        if mode & 0o077:
            raise ConfigError(f"{path}: other users may read this key; run 'chmod 600 {path}'")
        try:
            key = load_pem_private_key(content, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path}: is not an unencrypted Ed25519 private key in PEM; make one with 'keygen'")
        return cls(key)


def is_public_key(text: str) -> bool:
    """Whether the text is a public key as :attr:`SigningKey.public` writes it."""
    return _public(text) is not None


def verify(public: str, purpose: str, message: bytes, signature: str) -> bool:
    """Whether the signature is that of the key over this message for this purpose; malformed ones are not."""
    key = _public(public)
    if key is None:
        return False
    try:
        key.verify(_bytes(signature), _bound(purpose, message))
    except (InvalidSignature, ValueError):
        return False
    return True


def _public(text: str) -> Ed25519PublicKey | None:
    if not text.startswith(PREFIX):
        return None
    try:
        return Ed25519PublicKey.from_public_bytes(_bytes(text.removeprefix(PREFIX)))
    except ValueError:
        return None


def _bound(purpose: str, message: bytes) -> bytes:
    return purpose.encode() + b"\0" + message


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ValueError("not base64url") from None
