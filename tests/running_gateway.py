"""A gateway as its operator runs it: ``penstock serve`` with a store, limits and budgets, on real sockets.

The upstream listens in the test's own process, so that a test knows exactly what has reached a provider.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import attrs
import h11

from demo_process import PENSTOCK, user
from penstock.testing import RawClient, Reply
from penstock.testing.client import request_bytes

IS_FULL = os.environ.get("PENSTOCK_TESTS") == "full"
CHAT = "/v1/chat/completions"
MODEL = "gpt-4o-mini"
TOKEN = 1_000
"""What a token of output costs, nano-USD; input costs nothing."""
COST = 2 * TOKEN
"""Of an answer of ``answered``, and the most one can cost with ``max_tokens`` 2."""
PATIENCE_SECONDS = 30
CONFIG = """\
[gateway]
listen = "127.0.0.1:0"
log = "json"
spans = "{spans}"
workers = {workers}
plugins = ["store", "virtual_keys", "rate_limits", "routing", "prices", "budgets", "openai", "mock", "management"]
[gateway.limits]
drain_timeout = 5.0
"""


@attrs.define(eq=False)
class RunningGateway:
    """Processes of one gateway, their log as it comes, and how to reach them."""

    home: Path
    process: anyio.abc.Process
    workers: int
    events: list[dict[str, Any]] = attrs.field(factory=list)
    """Lines of the log."""
    port: int = 0
    clients: set[Client] = attrs.field(factory=set)
    """Connections not closed yet."""
    _changed: anyio.Event = attrs.field(factory=anyio.Event)
    _is_over: bool = False

    # --- log ------------------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Read what it writes, into the file ``log`` of its home too, until it ends."""
        assert self.process.stdout is not None
        pending = b""
        with (self.home / "log").open("ab") as log:
            async for part in self.process.stdout:
                log.write(part)
                *lines, pending = (pending + part).split(b"\n")
                self.events += [_event(line) for line in lines]
                self._tell()
        self._is_over = True
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def said(self, event: str, count: int = 1) -> dict[str, Any]:
        """Return the line that says something for the count-th time. Raises AssertionError where it never will."""
        with anyio.fail_after(PATIENCE_SECONDS):
            while True:
                found = [line for line in self.events if line["event"] == event]
                if len(found) >= count:
                    return found[count - 1]
                assert not self._is_over, f"the gateway ended before it said {event!r}: {self.events[-5:]}"
                await self._changed.wait()

    async def listening(self) -> None:
        """Return once every worker listens."""
        self.port = (await self.said("listening", self.workers))["port"]

    # --- processes ------------------------------------------------------------------------------------------------

    @property
    def pids(self) -> list[int]:
        """Return the processes that serve."""
        if self.workers == 1:
            return [self.process.pid]
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    async def kill(self) -> None:
        """Kill all of its processes at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        with anyio.fail_after(PATIENCE_SECONDS):
            await self.process.wait()

    async def stop(self) -> int:
        """End it as its operator does; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        with anyio.fail_after(PATIENCE_SECONDS):
            return await self.process.wait()

    # --- asking ---------------------------------------------------------------------------------------------------

    @property
    def token(self) -> str:
        """Return the first administrator's token."""
        return (self.home / "penstock.db.admin-token").read_text().strip()

    async def client(self) -> Client:
        """Return a connection to whichever worker takes it."""
        raw = RawClient()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: raw, "127.0.0.1", self.port)
        client = Client(self, raw, transport.get_extra_info("sockname")[1])
        self.clients.add(client)
        return client

    async def client_of(self, pid: int) -> Client:
        """Return a connection to one worker."""
        with anyio.fail_after(PATIENCE_SECONDS):
            while True:
                client = await self.client()
                await client.get("/readyz")
                if self._server_inode(client.own_port) in _socket_inodes(pid):
                    return client
                client.close()

    async def client_of_each(self) -> list[Client]:
        """Return a connection to each worker."""
        return [await self.client_of(pid) for pid in self.pids]

    def _server_inode(self, client_port: int) -> str:
        local, remote = f"0100007F:{self.port:04X}", f"0100007F:{client_port:04X}"
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        return next(row[9] for row in rows if row[1] == local and row[2] == remote)

    async def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        """Run a command in another terminal of the same user."""
        return await anyio.run_process(
            [str(PENSTOCK), *arguments],
            check=False, cwd=self.home, env={**user(self.home), **environment}, stdin=subprocess.DEVNULL,
        )  # fmt: skip


def _event(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    return found if isinstance(found, dict) and "event" in found else {"event": line.decode(errors="replace")}


def _socket_inodes(pid: int) -> set[str]:
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            name = os.readlink(entry.path)
        except FileNotFoundError:
            continue
        if name.startswith("socket:["):
            found.add(name[8:-1])
    return found


@attrs.define(eq=False)
class Client:
    """One connection, and so one worker."""

    gateway: RunningGateway
    raw: RawClient
    own_port: int

    async def request(self, method: str, path: str, body: Any = b"", *, key: str | None = None) -> Reply:
        """Return an answer. Raises ConnectionResetError where the gateway ends before all of it."""
        await self.raw.send(request_bytes(method, path, (), body, key=key))
        try:
            reply = await self.raw.receive_reply(method.encode())
        except h11.RemoteProtocolError as error:
            raise ConnectionResetError(str(error)) from error
        if not reply.is_complete:
            raise ConnectionResetError("the answer broke off")
        return reply

    async def get(self, path: str) -> Reply:
        return await self.request("GET", path)

    async def ask(self, key: str, **members: Any) -> Reply:
        """Ask for a chat completion."""
        return await self.request("POST", CHAT, chat(**members), key=key)

    async def api(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, status: int = 200) -> Any:
        """Ask the management API as its first administrator; returns what the body of the answer holds."""
        content = b"" if body is None else body
        reply = await self.request(method, f"/api/v1{path}", content, key=self.gateway.token)
        assert reply.status == status, (method, path, reply.status, reply.body)
        return json.loads(reply.body) if reply.body else None

    async def make(self, path: str, body: Mapping[str, Any]) -> Any:
        """Make an object; returns it."""
        return await self.api("POST", path, body, status=201)

    async def until(self, found: Callable[[Reply], bool], key: str, *, seconds: float = 2.0, **members: Any) -> Reply:
        """Ask again and again until an answer is as it should be. Raises TimeoutError."""
        replies: list[Reply] = []

        async def is_found() -> bool:
            replies[:] = [await self.ask(key, **members)]
            return found(replies[0])

        await until(is_found, seconds=seconds)
        return replies[0]

    def close(self) -> None:
        """Close the connection."""
        self.gateway.clients.discard(self)
        self.raw.close()


async def until(is_so: Callable[[], Awaitable[bool]], *, seconds: float) -> None:
    """Ask other processes again and again until something is so. Raises TimeoutError."""
    with anyio.fail_after(seconds):
        while True:
            if await is_so():
                return
            await anyio.sleep(0.01)


def chat(**members: Any) -> dict[str, Any]:
    """Return a chat request that ``answered`` answers at its highest price."""
    given = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    return {**given, **members}


def code_of(reply: Reply) -> str | None:
    """Return the code of a refusal."""
    return reply.header("X-Penstock-Error")


@asynccontextmanager
async def running(
    home: Path, workers: int = 1, *, spans: str = "off", environment: Mapping[str, str] | None = None
) -> AsyncIterator[RunningGateway]:
    """Run a gateway on the store in ``home``; all its processes are gone when this is left."""
    file = home / "penstock.toml"
    file.write_text(CONFIG.format(workers=workers, spans=spans))
    async with AsyncExitStack() as stack:
        process = await anyio.open_process(
            [str(PENSTOCK), "serve", "-c", str(file)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**user(home), **(environment or {})}, cwd=home, start_new_session=True,
        )  # fmt: skip
        await stack.enter_async_context(process)
        gateway = RunningGateway(home, process, workers)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(gateway.follow)
            try:
                yield gateway
            finally:
                for client in [*gateway.clients]:
                    client.close()
                _kill_group(process.pid)
                tasks.cancel_scope.cancel()


def _kill_group(pid: int) -> None:
    """Kill what is left of a session."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


async def seed(client: Client, base_url: str, **members: Any) -> dict[str, Any]:
    """Make a binding to an upstream, a price and a virtual key; returns the key, with its secret."""
    price = {
        "provider": "openai", "model": "*", "effective_at": "2020-01-01T00:00:00Z",
        "rates": {"input": 0, "output": TOKEN * 1_000_000},
    }  # fmt: skip
    await client.make("/prices/overrides", price)
    binding = {"name": "up", "type": "openai", "base_url": base_url, "credential": "sk-upstream", "models": [MODEL]}
    await client.make("/provider-bindings", binding)
    made: dict[str, Any] = await client.make("/virtual-keys", {"name": "k", "provider_bindings": ["up"], **members})
    return made
