"""A gateway that is killed at any moment under load: what reached the provider is paid for once, and nothing is held.

The short form kills six times; ``PENSTOCK_TESTS=full`` kills two hundred times.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
from collections import Counter
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from penstock.testing import LAST_CHUNK, STREAM_HEAD, FakeUpstream, Pause, RecordedRequest, Step, chunk, http_reply
from running_gateway import COST, IS_FULL, Client, RunningGateway, code_of, running, seed, until

pytestmark = pytest.mark.anyio
KILLS = 200 if IS_FULL else 6
CLIENTS = 12
CONCURRENCY = 16
"""What the key may have under way, a bit more than there are clients: a slot is freed after the last byte."""
LIMIT = 10**12
"""Of the budget under load: never reached."""
CATCH_UP_SECONDS = 5.0
"""How long what a dead process left may take to be in the ledger."""
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
ANSWER = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "m", "usage": USAGE,
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hi"}}],
}  # fmt: skip
EVENTS = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"H"}}]}\n\n',
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"i"}}]}\n\n',
    b'data: {"id":"c","choices":[],"usage":%b}\n\n' % json.dumps(USAGE).encode(),
    b"data: [DONE]\n\n",
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@attrs.define(eq=False)
class Provider:
    """Answer after a random while, in pieces, and keep the marker of all that came."""

    chance: random.Random
    tasks: Any
    reached: Counter[str] = attrs.field(factory=Counter)
    holds: list[Pause] = attrs.field(factory=list)
    """Of requests whose marker begins with ``hold``, which wait to be let go."""
    _held: anyio.Event = attrs.field(factory=anyio.Event)

    def serve(self, request: RecordedRequest) -> list[Step]:
        asked = json.loads(request.body)
        self.reached[asked["user"]] += 1
        pieces = [STREAM_HEAD, *map(chunk, EVENTS), LAST_CHUNK] if asked.get("stream") else [_reply()]
        if asked["user"].startswith("hold"):
            return [self._hold(), *pieces]
        steps: list[Step] = []
        for piece in pieces:
            steps += [self._delay(), piece]
        return steps

    def _delay(self) -> Pause:
        pause = Pause()
        self.tasks.start_soon(_release, pause, self.chance.uniform(0.0, 0.03))
        return pause

    def _hold(self) -> Pause:
        self.holds.append(Pause())
        held, self._held = self._held, anyio.Event()
        held.set()
        return self.holds[-1]

    async def wait_held(self, count: int) -> None:
        with anyio.fail_after(10):
            while len(self.holds) < count:
                await self._held.wait()

    def let_go(self) -> None:
        for pause in self.holds:
            pause.release()
        self.holds.clear()


def _reply() -> bytes:
    return http_reply(json.dumps(ANSWER).encode())


async def _release(pause: Pause, seconds: float) -> None:
    await anyio.sleep(seconds)  # a provider takes its time
    pause.release()


@attrs.define(eq=False)
class Trial:
    """One database through many deaths: what clients saw, what reached the provider, what the ledger says."""

    home: Path
    chance: random.Random
    provider: Provider
    upstream: FakeUpstream
    secret: str = ""
    budget_id: str = ""
    sent: int = 0
    seen: dict[str, str] = attrs.field(factory=dict)
    """Request id by marker, of the answers whose head a client got."""
    rows: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    """The ledger, by request id."""
    since: str = "2020-01-01T00:00:00Z"
    """Before this all rows are known."""
    statuses: Counter[int] = attrs.field(factory=Counter)

    # --- load -----------------------------------------------------------------------------------------------------

    async def load(self, gateway: RunningGateway) -> None:
        """Keep some clients asking until the gateway is gone."""
        async with anyio.create_task_group() as tasks:
            for _ in range(CLIENTS):
                tasks.start_soon(self._ask_on, gateway)

    async def _ask_on(self, gateway: RunningGateway) -> None:
        while True:
            try:
                client = await gateway.client()
            except ConnectionError:
                return
            try:
                while True:
                    await self._ask(client)
            except ConnectionError:
                pass  # killed: a worker alone, or all of them
            finally:
                client.close()

    async def _ask(self, client: Client) -> None:
        self.sent += 1
        marker = f"m-{self.sent}"
        before = len(client.raw.received)
        try:
            reply = await client.ask(self.secret, user=marker, stream=self.chance.random() < 0.5)
            self.statuses[reply.status] += 1
        finally:
            head, _, rest = bytes(client.raw.received[before:]).partition(b"\r\n\r\n")
            del client.raw.received[:]
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
            if b"x-penstock-request-id" in fields and (rest or head.endswith(b"\r\n")):
                self.seen[marker] = fields[b"x-penstock-request-id"].decode()

    # --- death ----------------------------------------------------------------------------------------------------

    async def live_and_die(self, gateway: RunningGateway) -> int:
        """Load a gateway and kill it; returns how many kills that were."""
        kills = 1
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.load, gateway)
            await anyio.sleep(self.chance.uniform(0.02, 0.5))  # the moment is the point: any
            if gateway.workers > 1 and self.chance.random() < 0.7:
                os.kill(self.chance.choice(gateway.pids), signal.SIGKILL)
                kills += 1
                await anyio.sleep(self.chance.uniform(0.02, 0.8))
            await gateway.kill()
        errors = [line for line in gateway.events if line.get("level") == "error" and line["event"] != "worker ended"]
        assert errors == []
        return kills

    async def die_starting(self) -> None:
        """Kill a gateway while it starts, replays what others left, or has just begun to listen."""
        async with running(self.home, self.chance.choice([1, 2])) as gateway:
            await anyio.sleep(self.chance.uniform(0.0, 1.2))
            await gateway.kill()

    # --- afterwards -----------------------------------------------------------------------------------------------

    async def check(self, gateway: RunningGateway) -> None:
        """Compare the ledger of a gateway just started with all that is known."""
        clients = await gateway.client_of_each()
        await self._read_ledger(clients[0])
        await self._check_money(clients)
        await self._check_slots(clients)
        await self._read_ledger(clients[0])
        self.since = (datetime.now(UTC) - timedelta(seconds=10)).strftime("%Y-%m-%dT%H:%M:%SZ")
        done = await gateway.run("ledger", "verify", "--port", str(gateway.port))
        assert done.returncode == 0, (done.stdout, done.stderr)
        self._check_files(gateway)
        for client in clients:
            client.close()

    async def _read_ledger(self, client: Client) -> None:
        """Read on until all that reached the provider is in the ledger, and the budget says the same."""
        with suppress(TimeoutError):
            await until(lambda: self._agrees(client), seconds=CATCH_UP_SECONDS)
        by_marker = Counter(row["end_user"] for row in self.rows.values() if row["end_user"] is not None)
        unnamed = [row for row in self.rows.values() if row["end_user"] is None]
        assert {(row["outcome"], row["error"]) for row in unnamed} <= {("refused", "rate_limit_exceeded")}
        assert {marker for marker in self.provider.reached if marker not in by_marker} == set()
        assert [marker for marker, count in by_marker.items() if count != 1] == []
        assert [marker for marker, count in self.provider.reached.items() if count != 1] == []
        for marker, request_id in self.seen.items():
            assert self.rows[request_id]["end_user"] == marker
        costs = Counter((row["outcome"], row["cost_nano_usd"]) for row in self.rows.values())
        assert set(costs) <= {("success", COST), ("interrupted", COST), ("interrupted", 0), ("refused", 0)}, costs
        spend = await client.api("GET", f"/budgets/{self.budget_id}/spend")
        assert spend["spent_nano_usd"] == self.total

    @property
    def total(self) -> int:
        return sum(row["cost_nano_usd"] for row in self.rows.values())

    async def _agrees(self, client: Client) -> bool:
        cursor = ""
        while True:
            page = await client.api("GET", f"/spend-events?limit=200&since={self.since}{cursor}")
            self.rows |= {row["request_id"]: row for row in page["data"]}
            if page["next_cursor"] is None:
                break
            cursor = f"&cursor={page['next_cursor']}"
        known = {row["end_user"] for row in self.rows.values()}
        spend = await client.api("GET", f"/budgets/{self.budget_id}/spend")
        return known >= self.provider.reached.keys() and bool(spend["spent_nano_usd"] == self.total)

    async def _check_money(self, clients: list[Client]) -> None:
        """Spend what is left to the last nano-dollar: the dead hold nothing of it."""
        here, *others = clients
        path = f"/budgets/{self.budget_id}"
        await here.api("PATCH", path, {"limit_nano_usd": self.total + COST})
        replies = [await self._ask_one(here, "exact") for _ in range(2)]
        assert [reply.status for reply in replies] == [200, 402], replies[0].body
        await here.api("PATCH", path, {"limit_nano_usd": LIMIT})
        for client in others:  # who has seen the low limit must have seen it gone
            await until(lambda client=client: self._is_let_in(client), seconds=2)  # type: ignore[misc]

    async def _is_let_in(self, client: Client) -> bool:
        reply = await self._ask_one(client, "again")
        return bool(reply.status == 200)

    async def _ask_one(self, client: Client, name: str) -> Any:
        self.sent += 1
        return await client.ask(self.secret, user=f"{name}-{self.sent}")

    async def _check_slots(self, clients: list[Client]) -> None:
        """Have as many exchanges under way as the key may: the dead keep no slot."""
        gateway = clients[0].gateway
        opened = [await gateway.client() for _ in range(CONCURRENCY)]
        replies: list[Any] = []

        async def hold(client: Client) -> None:
            replies.append(await self._ask_one(client, "hold"))

        async with anyio.create_task_group() as tasks:
            for client in opened:
                tasks.start_soon(hold, client)
            await self.provider.wait_held(CONCURRENCY)
            refused = await self._ask_one(clients[-1], "more")
            assert (refused.status, code_of(refused)) == (429, "rate_limit_exceeded")
            self.provider.let_go()
        assert {reply.status for reply in replies} == {200}
        for client in opened:
            client.close()

    def _check_files(self, gateway: RunningGateway) -> None:
        database = self.home / "penstock.db"
        with closing(sqlite3.connect(database)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            doubles = (
                "SELECT end_user, COUNT(*) FROM ledger JOIN end_users ON end_users.id = end_user_id"
                " GROUP BY end_user HAVING COUNT(*) > 1"
            )
            assert connection.execute(doubles).fetchall() == []
            holders = {row[0] for row in connection.execute("SELECT holder FROM holders")}
            leases = {row[0] for row in connection.execute("SELECT holder FROM leases")}
        journal = {path.name.partition(".")[0] for path in (self.home / "penstock.db.journal").iterdir()}
        assert leases <= holders == journal
        assert len(holders) == gateway.workers
        assert list((self.home / "penstock.db.journal").glob("*.refused")) == []


async def _plant(trial: Trial) -> None:
    async with running(trial.home) as gateway:
        await gateway.listening()
        client = await gateway.client()
        key = await seed(client, trial.upstream.base_url, rate_limits={"concurrency": CONCURRENCY})
        trial.secret = key["secret"]
        budget = {"scope": "project", "project": "default", "window": "total", "limit_nano_usd": LIMIT}
        trial.budget_id = (await client.make("/budgets", {**budget, "reserve": "max"}))["id"]
        client.close()
        await gateway.kill()


@pytest.mark.timeout(3600 if IS_FULL else 120)
async def test_killed_gateway_has_all_that_reached_the_provider_in_the_ledger_once(tmp_path: Path) -> None:
    chance = random.Random(int(os.environ.get("PENSTOCK_SEED", "1")))
    async with anyio.create_task_group() as tasks:
        provider = Provider(chance, tasks)
        async with FakeUpstream([provider.serve], repeat=True) as upstream:
            trial = Trial(tmp_path, chance, provider, upstream)
            await _plant(trial)
            kills = number = 0
            while kills < KILLS:
                async with running(tmp_path, 1 + number % 2) as gateway:
                    await gateway.listening()
                    if number:
                        await trial.check(gateway)
                    kills += await trial.live_and_die(gateway)
                upstream.requests.clear()
                number += 1
                if number % 3 == 1:
                    await trial.die_starting()
                    kills += 1
            async with running(tmp_path) as gateway:
                await gateway.listening()
                await trial.check(gateway)
                assert await gateway.stop() == 0
    outcomes = Counter(row["outcome"] for row in trial.rows.values())
    # A slot of a worker that died under the others is free only once they have noticed.
    assert set(trial.statuses) <= {200, 429}, trial.statuses
    print(f"{kills} kills, {outcomes}")  # noqa: T201
    assert outcomes["success"] > 10 * kills
    assert outcomes["interrupted"] > kills
    assert list((tmp_path / "penstock.db.journal").iterdir()) == []
