"""Virtual keys: their form, their checksum, their hash."""

import hashlib
import hmac
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import KeyHasher, display_prefix, hash_key, is_well_formed, new_key
from penstock.keys import checksum

BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("env", ["live", "test"])
@pytest.mark.parametrize(
    ("namespace", "stem"), [("penstock", "ps"), ("langwatch", "lw"), ("our_gateway", "our_gateway")]
)
def test_new_key_has_the_documented_form(namespace: str, env: Literal["live", "test"], stem: str) -> None:
    key = new_key(namespace, env)
    prefix = f"{stem}_vk_{env}_"
    assert key.startswith(prefix)
    assert len(key) == len(prefix) + 26 + 32 + 6
    assert set(key[len(prefix) :]) <= set(BASE62)
    assert is_well_formed(key.encode(), namespace)


def test_new_keys_differ() -> None:
    assert len({new_key() for _ in range(200)}) == 200


def test_key_of_another_namespace_is_not_well_formed() -> None:
    assert not is_well_formed(new_key("langwatch").encode())


@given(position=st.integers(0, 74), character=st.sampled_from(BASE62))
def test_any_wrong_character_is_refused(position: int, character: str) -> None:
    key = new_key()
    changed = key[:position] + character + key[position + 1 :]
    assert is_well_formed(changed.encode()) is (changed == key)


@given(first=st.integers(11, 73))
def test_two_swapped_characters_are_refused(first: int) -> None:
    key = new_key()
    swapped = key[:first] + key[first + 1] + key[first] + key[first + 2 :]
    assert is_well_formed(swapped.encode()) is (swapped == key)


@given(st.binary(max_size=100))
def test_anything_else_is_refused_without_an_exception(noise: bytes) -> None:
    assert not is_well_formed(noise)
    assert not is_well_formed(b"ps_vk_live_" + noise)


def test_cut_and_extended_keys_are_refused() -> None:
    key = new_key().encode()
    assert not any(is_well_formed(key[:length]) for length in range(len(key)))
    assert not is_well_formed(key + b"0")


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_hash_is_the_standard_librarys_hmac(pepper: bytes, secret: bytes) -> None:
    expected = hmac.new(pepper, secret, hashlib.sha256).digest()
    assert hash_key(pepper, secret) == expected
    hasher = KeyHasher(pepper)
    assert hasher.hash(secret) == hasher.hash(secret) == expected


def test_a_hash_is_no_key() -> None:
    key_hash = hash_key(b"pepper", new_key().encode())
    assert not is_well_formed(key_hash)
    assert not is_well_formed(key_hash.hex().encode())


def test_display_prefix_ends_at_the_sixth_character_of_the_ulid() -> None:
    key = new_key()
    assert display_prefix(key) == key[: len("ps_vk_live_") + 6]


@given(st.binary(max_size=64))
def test_checksum_is_six_base62_characters(text: bytes) -> None:
    assert len(checksum(text)) == 6
    assert set(checksum(text).decode()) <= set(BASE62)
