"""Checks of Vault."""

from __future__ import annotations

from penstock.governance import Vault

_CONTEXT = "provider_binding:gpc_1"


def check_vault(vault: Vault, same: Vault, stranger: Vault) -> None:
    """Check a vault, another one opened with the same keys, and one with other keys. Raises AssertionError."""
    for secret in ("sk-1234", "", "ä\0\n" * 500):
        sealed = vault.seal(secret, context=_CONTEXT)
        assert vault.open(sealed, context=_CONTEXT) == secret, "a secret is opened as it was sealed"
        assert same.open(sealed, context=_CONTEXT) == secret, "the same keys open it elsewhere"
        assert len(secret) < 5 or secret not in sealed, "a sealed secret does not show"
        assert sealed.isascii(), "sealed secrets are plain text"
        assert sealed.isprintable(), "sealed secrets are plain text"
        _expect_refusal(vault, sealed, "provider_binding:gpc_2", "another context")
        _expect_refusal(stranger, sealed, _CONTEXT, "another key")
        for damaged in _damaged(sealed):
            _expect_refusal(vault, damaged, _CONTEXT, f"damage ({damaged!r} for {sealed!r})")
    twice = {vault.seal("sk-1234", context=_CONTEXT) for _ in range(2)}
    assert len(twice) == 2, "the same secret is sealed differently each time"
    assert len(vault.pepper) >= 16, "a pepper has 16 bytes or more"
    assert vault.pepper == same.pepper, "the pepper stays the same"
    assert vault.pepper != stranger.pepper, "another vault has another pepper"


def _damaged(sealed: str) -> list[str]:
    flipped = [
        sealed[:place] + ("A" if sealed[place] != "A" else "B") + sealed[place + 1 :]
        for place in range(0, len(sealed) - 1, max(1, len(sealed) // 40))
    ]
    return [*flipped, sealed[:-4], sealed[1:], f"{sealed}AAAA", "", "v1", "sk-1234"]


def _expect_refusal(vault: Vault, sealed: str, context: str, what: str) -> None:
    try:
        vault.open(sealed, context=context)
    except ValueError:
        return
    raise AssertionError(f"{what} must raise ValueError")
