"""Create, spend, refund, crash, reset, rotate, archive, in any order: totals are what the ledger says, always."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import attrs
import msgspec
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from governed_gateway import BODY, CHAT, TOKEN, Clock, Governed, governed
from penstock import hash_key, new_key
from penstock.governance import LedgerEntry, Vault, new_id
from penstock.testing import FakeUpstream, RecordedRequest, Stall, Step, http_reply

IS_FULL = os.environ.get("PENSTOCK_TESTS") == "full"
SCOPES = ("organization", "team", "project", "virtual_key", "principal")
WINDOWS = ("minute", "day", "month", "total", "manual")
ANSWER = b'{"id":"x","choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":0}}'


@attrs.define(eq=False)
class Upstream:
    """Answer with as many tokens as a header says, or not at all."""

    stalls: list[Stall] = attrs.Factory(list)

    def __call__(self, request: RecordedRequest) -> Sequence[Step]:
        wish = request.headers.get(b"x-tokens") or b"1"
        if wish == b"stall":
            self.stalls.append(Stall())
            return [self.stalls[-1]]
        return [http_reply(ANSWER % int(wish))] if wish != b"error" else [http_reply(b"{}", 400)]


class Governance(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.portal = self.stack.enter_context(start_blocking_portal("asyncio"))
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.generation = 0
        self.clock = Clock()
        self.upstream = Upstream()
        self.provider = FakeUpstream([self.upstream], repeat=True)
        self.budgets: dict[str, int] = {}
        """Limits of those that are active."""
        self.expected_rows = 0
        self.inner = ExitStack()

    # --- life -----------------------------------------------------------------------------------------------------

    @property
    def home(self) -> Path:
        return self.folder / str(self.generation)

    def open(self, *, is_fresh: bool) -> Governed:
        context = governed(self.home, self.provider, clock=self.clock, is_fresh=is_fresh)
        return self.inner.enter_context(self.portal.wrap_async_context_manager(context))

    @initialize()
    def start(self) -> None:
        self.home.mkdir()
        self.gateway = self.open(is_fresh=True)

    def teardown(self) -> None:
        self.inner.close()
        self.stack.close()

    def call(self, function: Any, *arguments: Any, **named: Any) -> Any:
        async def bounded() -> Any:
            with anyio.fail_after(30):
                return await function(*arguments, **named)

        return self.portal.call(bounded)

    # --- what happens ---------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.budgets) < 6)
    @rule(
        scope=st.sampled_from(SCOPES),
        window=st.sampled_from(WINDOWS),
        limit=st.integers(0, 500),
        reserve=st.sampled_from(("expected", "max", "none")),
        breach=st.sampled_from(("block", "block", "warn")),
    )
    def create(self, scope: str, window: str, limit: int, reserve: str, breach: str) -> None:
        members = {"window": window, "reserve": reserve, "on_breach": breach}
        budget_id = self.call(self.gateway.budget, limit * TOKEN, scope, **members)
        self.budgets[budget_id] = limit * TOKEN

    @rule(tokens=st.integers(0, 100), seconds=st.sampled_from((0.0, 0.4, 30.0, 90_000.0)))
    def spend(self, tokens: int, seconds: float) -> None:
        self.clock.now += seconds
        reply = self.call(self.gateway.ask, {**BODY, "max_tokens": 5}, headers={"X-Tokens": str(tokens)})
        assert reply.status in (200, 402)
        self.expected_rows += 1

    @rule()
    def fail(self) -> None:
        reply = self.call(self.gateway.ask, headers={"X-Tokens": "error"})
        assert reply.status in (400, 402)
        self.expected_rows += 1

    @rule(data=st.data(), part=st.integers(1, 4))
    def refund(self, data: st.DataObject, part: int) -> None:
        rows = self.call(self.gateway.rows)
        refunded = {row.adjusts for row in rows}
        spent = [row for row in rows if row.cost_nano_usd > 0 and row.request_id not in refunded]
        if not spent:
            return
        row = data.draw(st.sampled_from(spent))
        self.call(self.gateway.reader.adjust, _refund_of(row, row.cost_nano_usd // part, self.clock.now))
        self.expected_rows += 1

    @rule(is_busy=st.booleans())
    def crash(self, is_busy: bool) -> None:
        if is_busy:
            self.expected_rows += self.call(self._begin)
        before, organization = self.home, self.gateway
        self.generation += 1
        shutil.copytree(before, self.home)
        self.inner.close()
        self.inner = ExitStack()
        self.gateway = self.open(is_fresh=False)
        self.gateway.key_id, self.gateway.harness.key = organization.key_id, organization.harness.key
        self.call(self._wait_recovered)

    async def _begin(self) -> int:
        """Have an exchange under way; returns whether budgets let it in."""
        client = await self.gateway.harness.raw()
        known = len(self.upstream.stalls)
        fields = {"X-Tokens": "stall"}
        await client.send(self.gateway.harness.request_bytes("POST", CHAT, fields, {**BODY, "max_tokens": 5}))
        while not client.received and len(self.upstream.stalls) == known:
            await anyio.lowlevel.checkpoint()
        if client.received:
            return 1
        await self.upstream.stalls[-1].reached.wait()
        return 1

    async def _wait_recovered(self) -> None:
        while len(await self.gateway.rows()) < self.expected_rows:
            await anyio.lowlevel.checkpoint()

    @precondition(lambda self: self.budgets)
    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        budget_id = data.draw(st.sampled_from(sorted(self.budgets)))
        self.clock.now += 1
        reset_at = f"{_rfc3339(self.clock.now)}"
        self.call(self.gateway.change, "budget", budget_id, period_reset_at=reset_at)
        assert self.call(self.gateway.total, budget_id) == 0

    @rule()
    def rotate(self) -> None:
        secret = new_key()
        hashed = hash_key(self.gateway.get(Vault).pepper, secret.encode()).hex()
        self.call(self.gateway.change, "virtual_key", self.gateway.key_id, hash=hashed)
        self.gateway.harness.key = secret

    @precondition(lambda self: self.budgets)
    @rule(data=st.data())
    def archive(self, data: st.DataObject) -> None:
        budget_id = data.draw(st.sampled_from(sorted(self.budgets)))
        self.call(self.gateway.archive, "budget", budget_id)
        del self.budgets[budget_id]

    # --- what holds -----------------------------------------------------------------------------------------------

    @invariant()
    def ledger_verifies(self) -> None:
        if not hasattr(self, "gateway"):
            return
        rows = self.call(self.gateway.rows)
        assert len(rows) == len({row.request_id for row in rows}) == self.expected_rows
        assert self.call(self.gateway.discrepancies) == []
        for budget_id in self.budgets:
            self.call(self.gateway.total, budget_id)


def _rfc3339(moment: float) -> str:
    from datetime import UTC, datetime  # noqa: PLC0415

    return datetime.fromtimestamp(moment, UTC).isoformat()


def _refund_of(row: LedgerEntry, amount: int, now: float) -> LedgerEntry:
    return msgspec.structs.replace(
        row,
        request_id=new_id("adj_"),
        started_at_ns=int(now * 1e9),
        cost_nano_usd=-amount,
        cost_source="adjustment",
        outcome="adjustment",
        usage=None,
        attempts=(),
        adjusts=row.request_id,
    )


Governance.TestCase.settings = settings(
    deadline=None,
    max_examples=100 if IS_FULL else 8,
    stateful_step_count=40 if IS_FULL else 15,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # a run on files is too slow to be shrunk
    print_blob=True,
)
TestGovernance = Governance.TestCase
