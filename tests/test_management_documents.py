"""What the management plane reads and writes: merges, money, times, cursors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.governance import KINDS
from penstock_plugins.management.catalogue import RESOURCES
from penstock_plugins.management.cursors import ListPlace, read_cursor, write_cursor
from penstock_plugins.management.documents import merged, structure, unstructure
from penstock_plugins.management.faults import RefusedError
from penstock_plugins.management.places import GRANTS, label_of
from penstock_plugins.management.times import normal_time, read_time, write_time


class Pepper:
    """Hold what cursors are signed under."""

    pepper = b"a pepper for tests only"


VAULT: Any = Pepper()
TREES = st.recursive(
    st.none() | st.booleans() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3)


@given(OBJECTS, OBJECTS)
def test_a_merge_patch_applied_twice_is_applied_once(document: dict[str, Any], patch: dict[str, Any]) -> None:
    once = merged(document, patch)
    assert merged(once, patch) == once
    assert all(name not in once for name, value in patch.items() if value is None)


@given(st.integers(0, 4_000_000_000_000))
def test_times_keep_their_millisecond(ms: int) -> None:
    assert round(read_time(write_time(ms)) * 1000) == ms


@pytest.mark.parametrize("text", ["", "2026-01-01", "2026-01-01T00:00:00", "noon", "9999-12-31T23:59:59Z"])
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="RFC 3339"):
        normal_time(text)


@given(st.text(min_size=1, max_size=40), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_a_cursor_returns_what_it_was_made_of_for_its_list_alone(after: str, filters: dict[str, str]) -> None:
    place = ListPlace("tok_1", "/teams", filters)
    cursor = write_cursor(VAULT, place, after)
    assert read_cursor(VAULT, place, cursor) == after
    for other in (ListPlace("tok_2", "/teams", filters), ListPlace("tok_1", "/users", filters)):
        with pytest.raises(RefusedError):
            read_cursor(VAULT, other, cursor)


@given(st.text(max_size=60))
def test_a_forged_cursor_is_refused(cursor: str) -> None:
    with pytest.raises(RefusedError):
        read_cursor(VAULT, ListPlace("tok_1", "/teams", {}), cursor)


def test_every_kind_is_a_resource_with_its_permissions_and_label() -> None:
    assert {resource.kind.name for resource in RESOURCES} == set(KINDS) == set(GRANTS)
    for resource in RESOURCES:
        assert GRANTS[resource.kind.name] == resource.grants
        assert label_of(resource.kind.name) == resource.label
        assert not set(resource.kind.secrets) & set(resource.members) - set(resource.extras)


def test_a_document_survives_the_store() -> None:
    given_members = {"name": "k", "project_id": "p", "principal_id": "u", "tags": ["a"], "rate_limits": {"rpm": 3}}
    key = structure(given_members, KINDS["virtual_key"].type)
    assert structure(unstructure(key), KINDS["virtual_key"].type) == key
