"""Find the encryption keys and the pepper of a database, make them at its first start, and see that they fit."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection

from penstock import ConfigurationError, Secret
from penstock_plugins.store.files import Place, read_private, write_private
from penstock_plugins.store.objects import read_meta, write_meta
from penstock_plugins.store.vault import MIN_PEPPER_BYTES, Ring, SealedVault, new_encryption_key, new_pepper

CHECK = "vault.check"


def unlock(connection: Connection, place: Place, encryption_key: Secret | None, pepper: Secret | None) -> SealedVault:
    """Return the vault of a database, in the transaction of ``connection``. Raises ConfigurationError.

    What the configuration does not give is in files beside the database, made here while it holds nothing yet.
    """
    check = read_meta(connection, CHECK)
    ring = _ring(encryption_key, place.key, is_fresh=check is None)
    hashed_under = _pepper(pepper, place.pepper, is_fresh=check is None)
    reread = None if encryption_key is not None else lambda: _ring(None, place.key, is_fresh=False)
    vault = SealedVault(ring, hashed_under, reread)
    if check is None:
        write_meta(connection, CHECK, vault.check_value())
    elif (fault := vault.fault_of(check)) is not None:
        raise ConfigurationError(fault)
    return vault


def ring_of(given: Secret | None, path: Path) -> Ring:
    """Return the encryption keys of a database that was made before. Raises ConfigurationError."""
    return _ring(given, path, is_fresh=False)


def pepper_of(given: Secret | None, path: Path) -> bytes:
    """Return the pepper of a database that was made before. Raises ConfigurationError."""
    return _pepper(given, path, is_fresh=False)


def fault_of_keys(check: str | None, place: Place, encryption_key: Secret | None, pepper: Secret | None) -> str | None:
    """Say why keys do not fit the database whose check value this is. Raises ConfigurationError."""
    vault = SealedVault(ring_of(encryption_key, place.key), pepper_of(pepper, place.pepper))
    return None if check is None else vault.fault_of(check)


def _ring(given: Secret | None, path: Path, *, is_fresh: bool) -> Ring:
    if given is not None:
        text, where = given.reveal(), "encryption_key:"
    else:
        text, where = _kept(path, f"{new_encryption_key()}\n", "encryption_key", is_fresh=is_fresh), f"{path}"
    try:
        return Ring(text)
    except ValueError as error:
        raise ConfigurationError(f"{where} {error}") from None


def _pepper(given: Secret | None, path: Path, *, is_fresh: bool) -> bytes:
    if given is not None:
        text, where = given.reveal(), "pepper:"
    else:
        text, where = _kept(path, f"{new_pepper()}\n", "pepper", is_fresh=is_fresh), f"{path}"
    pepper = text.encode()
    if len(pepper) < MIN_PEPPER_BYTES:
        raise ConfigurationError(f"{where} must be at least {MIN_PEPPER_BYTES} characters")
    return pepper


def _kept(path: Path, fresh: str, what: str, *, is_fresh: bool) -> str:
    """Return what a file holds, made now where the database holds nothing that needs another."""
    text = read_private(path)
    if text is None and is_fresh:
        write_private(path, fresh)
        text = read_private(path)
    if text is None:
        raise ConfigurationError(
            f"{what}: {path} is missing, and the database was made with it; put it back, or set {what}"
        )
    return text
