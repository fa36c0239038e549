"""The OpenAPI document: valid, complete, and true of what the API answers to anything (schemathesis)."""

from __future__ import annotations

import os
from typing import Any

import anyio
import anyio.to_thread
import attrs
import jsonschema
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

from management_client import Api, running_api
from penstock_plugins.management.catalogue import RESOURCES
from penstock_plugins.management.openapi import document
from penstock_plugins.management.rest.table import ROUTES

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


def attack(url: str, token: str) -> int:
    """Call every operation with what its schema makes, valid and not; returns how many calls there were."""
    schema = schemathesis.openapi.from_dict(document(ROUTES), config=SchemathesisConfig())
    schema.config.update(base_url=f"{url}/api/v1")
    calls = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation is None or operation.path in ("/config/apply",):
            continue
        strategies = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=st.one_of(strategies))
        def one(case: Any) -> None:
            nonlocal calls
            calls += 1
            case.call_and_validate(checks=CHECKS, headers={"Authorization": f"Bearer {token}"}, timeout=20)

        one()
    return calls


@attrs.frozen
class Attacked:
    calls: int


@pytest.mark.anyio
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("anyio_backend", [pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio")])
async def test_no_request_brings_a_server_error_or_an_answer_outside_the_schema() -> None:
    async with running_api(socket=True) as api:
        await seed(api)
        assert api.token is not None
        calls = await anyio.to_thread.run_sync(attack, api.harness.base_url, api.token)
        assert calls >= len(ROUTES) - 1
        assert not api.harness.faults


async def seed(api: Api) -> None:
    await api.make("/provider-bindings", {"name": "m", "type": "mock"})
    await api.make("/virtual-keys", {"name": "k"})
