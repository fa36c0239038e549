"""The OpenAPI document: valid, complete, and true of what the API answers to anything (schemathesis)."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import anyio
import anyio.to_thread
import jsonschema  # type: ignore[import-untyped]
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from management_client import running_api
from penstock_plugins.management.catalogue import RESOURCES
from penstock_plugins.management.openapi import document
from penstock_plugins.management.rest.table import ROUTES
from test_management_permissions import populate

EXAMPLES = 200 if os.environ.get("PENSTOCK_TESTS") == "full" else 6


def test_every_route_is_in_the_document() -> None:
    paths = document(ROUTES)["paths"]
    found = {(method.upper(), path) for path, operations in paths.items() for method in operations}
    assert found == {(route.method, route.path) for route in ROUTES}


def test_members_carry_their_docstrings() -> None:
    schemas = document(ROUTES)["components"]["schemas"]
    assert schemas["VirtualKey"]["properties"]["previous_expires_at"]["description"] == "Until when that one works."
    assert "hash" not in schemas["VirtualKey"]["properties"]
    assert "credential" not in schemas["Binding"]["properties"]


@pytest.mark.anyio
async def test_what_is_shown_fits_its_schema() -> None:
    async with running_api() as api:
        described = await api.get("/openapi.json")
        assert described == document(ROUTES)
        await api.make("/virtual-keys", {"name": "k", "budget": {"window": "day", "limit_usd": "1"}})
        for resource in RESOURCES:
            schema = described["components"]["schemas"][resource.kind.type.__name__]
            assert set(schema["required"]) == set(schema["properties"])
            for row in (await api.get(f"/{resource.path}"))["data"]:
                jsonschema.Draft202012Validator(schema).validate(row)
                assert set(row) == set(schema["properties"])


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def aim(case: Any, ids: dict[str, str]) -> None:
    """Point a case at what there is: a real id in the path, and no name in the body that nothing has."""
    route = next(route for route in ROUTES if (route.method, route.path) == (case.method.upper(), case.path))
    if route.resource is None:
        return
    if "id" in (case.path_parameters or {}):
        case.path_parameters["id"] = ids[route.resource.kind.name]
    if isinstance(case.body, dict):
        named = {path.partition(".")[0].removesuffix("[]") for path in route.resource.references}
        for name in (*route.resource.aliases, *named):
            case.body.pop(name, None)
        if route.name == "create_budgets":
            case.body["scope"] = "project"
        if "type" in case.body:
            case.body["type"] = "mock"


def attack(url: str, token: str, ids: dict[str, str]) -> Counter[tuple[str, int]]:
    """Call every operation with what its schema makes, valid and not; returns how often each status came."""
    schema = schemathesis.openapi.from_dict(document(ROUTES), config=SchemathesisConfig())
    schema.config.update(base_url=f"{url}/api/v1")
    seen: Counter[tuple[str, int]] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()  # type: ignore[union-attr]
        strategies = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=st.one_of(strategies), is_aimed=st.booleans())
        def one(case: Any, is_aimed: bool) -> None:
            if is_aimed and case.method.upper() != "DELETE":
                aim(case, ids)
            answered = case.call_and_validate(checks=CHECKS, headers={"Authorization": f"Bearer {token}"}, timeout=20)
            seen[case.method.upper(), answered.status_code] += 1

        one()
    return seen


@pytest.mark.anyio
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("anyio_backend", [pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio")])
async def test_no_request_brings_a_server_error_or_an_answer_outside_the_schema() -> None:
    async with running_api(socket=True) as api:
        ids = (await populate(api, "seed")).ids
        assert api.token is not None
        seen = await anyio.to_thread.run_sync(attack, api.harness.base_url, api.token, ids)
        assert not api.harness.faults
        assert seen.total() >= len(ROUTES)
        assert {("GET", 200), ("POST", 201), ("POST", 400), ("PATCH", 200), ("PATCH", 400)} <= seen.keys(), seen
