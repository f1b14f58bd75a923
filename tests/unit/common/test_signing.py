"""Signatures: for one purpose, by one key, over exactly these bytes; and keys that nobody else can read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from common.errors import ConfigError
from common.signing import AUDIT_HEAD, PLAN, SigningKey, is_public_key, verify

KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


def test_a_signature_holds_for_its_key_purpose_and_message_alone() -> None:
    signature = KEY.sign(PLAN, b"digest")
    assert verify(KEY.public, PLAN, b"digest", signature)
    assert not verify(KEY.public, AUDIT_HEAD, b"digest", signature)
    assert not verify(KEY.public, PLAN, b"digesu", signature)
    assert not verify(SigningKey.fresh().public, PLAN, b"digest", signature)


def test_it_is_the_ed25519_of_the_standard_over_purpose_nul_message() -> None:
    """RFC 8032, by the library's own verification of raw bytes."""
    import base64

    raw = base64.urlsafe_b64decode(KEY.sign(PLAN, b"digest") + "==")
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32))).public_key()
    key.verify(raw, b"consilium plan v1\0digest")
    assert KEY.public == "ed25519:" + base64.urlsafe_b64encode(key.public_bytes_raw()).decode().rstrip("=")


@pytest.mark.parametrize("signature", ["", "=", "ä", "a", "A" * 86, "A" * 1000, "not base64!"])
def test_what_is_no_signature_does_not_hold(signature: str) -> None:
    assert not verify(KEY.public, PLAN, b"digest", signature)


@pytest.mark.parametrize("key", ["", "ed25519:", "ed25519:AAAA", "rsa:" + "A" * 43, KEY.public[8:], KEY.public + "A"])
def test_what_is_no_public_key_vouches_for_nothing(key: str) -> None:
    assert not is_public_key(key)
    assert not verify(key, PLAN, b"digest", KEY.sign(PLAN, b"digest"))


def test_a_key_is_kept_in_a_file_of_its_owner_and_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "keys" / "coordinator.pem"
    made = SigningKey.create(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert SigningKey.load(file).public == made.public
    with pytest.raises(ConfigError, match="never overwritten"):
        SigningKey.create(file)
    assert SigningKey.load(file).public == made.public


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    SigningKey.create(file)
    os.chmod(file, 0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        SigningKey.load(file)


def test_another_kind_of_file_is_told(tmp_path: Path) -> None:
    pem = (Encoding.PEM, PrivateFormat.PKCS8)
    contents = [
        b"",
        b"no key",
        generate_private_key(SECP256R1()).private_bytes(*pem, NoEncryption()),
        Ed25519PrivateKey.generate().private_bytes(*pem, BestAvailableEncryption(b"password")),
    ]
    for content in contents:
        file = tmp_path / "key.pem"
        file.write_bytes(content)
        file.chmod(0o600)
        with pytest.raises(ConfigError, match="is not an unencrypted Ed25519 private key"):
            SigningKey.load(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        SigningKey.load(tmp_path / "nowhere.pem")
