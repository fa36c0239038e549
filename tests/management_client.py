"""A management API in a gateway of its own, on a store of its own, for tests."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs

from penstock.governance import LocalAdmin
from penstock.testing import Harness, Reply
from penstock_plugins.management import Management

PLUGINS = ("store", "virtual_keys", "routing", "mock", "openai", "anthropic", ("management", Management))


@attrs.define(eq=False)
class Answered:
    """Hold one answer."""

    status: int
    headers: Any
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.body["error"]
        return found


@attrs.define(eq=False)
class Api:
    """Ask as whoever holds a token."""

    harness: Harness
    token: str | None

    async def ask(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, **headers: str
    ) -> Answered:
        fields = [(b"host", b"gateway")]
        if self.token is not None:
            fields.append((b"authorization", b"Bearer " + self.token.encode()))
        else:
            fields.append((b"authorization", b"none"))
        content = b""
        if body is not None or raw is not None:
            content = json.dumps(body).encode() if raw is None else raw
            if "content_type" not in headers:
                fields.append((b"content-type", b"application/json"))
        fields += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        reply: Reply = await self.harness.request(method, f"/api/v1{path}", fields, content)
        assert not self.harness.faults, self.harness.faults
        return Answered(reply.status, reply.headers, reply.body)

    async def get(self, path: str) -> Any:
        answered = await self.ask("GET", path)
        assert answered.status == 200, answered.raw
        return answered.body

    async def make(self, path: str, body: Mapping[str, Any]) -> Any:
        answered = await self.ask("POST", path, body)
        assert answered.status == 201, answered.raw
        return answered.body

    def holding(self, token: str | None) -> Api:
        """Return the same API asked by another."""
        return Api(self.harness, token)

    async def token_for(self, **members: Any) -> Api:
        """Make a token and return the API asked with it."""
        made = await self.make("/api-tokens", {"name": f"token {members}"[:180], **members})
        return self.holding(made["secret"])


@asynccontextmanager
async def running_api(*, socket: bool = False, plugins: tuple[Any, ...] = PLUGINS) -> AsyncIterator[Api]:
    """Run a gateway with a fresh store and yield its API as its first administrator asks it."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"store": {"url": f"sqlite:///{Path(folder) / 'test.db'}"}, "virtual_keys": {}, "routing": {}}
        async with Harness(plugins, config, bare=True, socket=socket) as harness:
            local: LocalAdmin = harness.gateway.generation.services.get(LocalAdmin)  # type: ignore[type-abstract]
            yield Api(harness, local.admin_token)
