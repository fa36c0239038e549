"""Secrets are nowhere in the clear: not in files, logs, spans, answers, audit, backups or lists of processes.

What may hold one is named: ``KEEPERS``, all of mode 0600, and the one answer that made it.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import stat
import string
import subprocess
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from demo_process import PENSTOCK, user
from penstock.testing import FakeUpstream, RecordedRequest, Step, http_reply
from penstock.testing.client import request_bytes
from running_gateway import MODEL, Client, RunningGateway, chat, running
from test_governed_workers import answer

pytestmark = pytest.mark.anyio
KEEPERS = (
    "penstock.db.admin-token",
    "penstock.db.key",
    "penstock.db.pepper",
    "run/penstock/run/*.json",
    ".config/penstock/profile.json",
    "whole.backup.key",
    "whole.backup.pepper",
    "given/*",
)
"""Files that are there to hold a secret; those below ``given`` are the test's own."""
FRAGMENT = 12
"""How much of a secret in a row counts as all of it, characters."""
_LETTERS = string.ascii_letters + string.digits


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def made_up(prefix: str) -> str:
    """Return a secret that can be recognised by any part of it."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(48))


@attrs.define(eq=False)
class Hunt:
    """Collect secrets, and look for them."""

    known: dict[str, str] = attrs.field(factory=dict)
    """What they are, by what to look for."""

    def add(self, what: str, secret: str) -> str:
        """Look for a secret from now on, in parts and as it may be encoded; returns it."""
        # Of keys and tokens the beginning may be shown, of credentials the last four characters.
        hidden = secret[-40:]
        parts = [hidden[start : start + FRAGMENT] for start in range(0, len(hidden) - FRAGMENT + 1, FRAGMENT)]
        assert parts
        plain = secret.encode()
        coded = [plain.hex(), base64.b64encode(plain).decode()[:-4], base64.urlsafe_b64encode(plain).decode()[:-4]]
        self.known.update(dict.fromkeys([*parts, *coded], what))
        return secret

    def found_in(self, content: bytes | str) -> set[str]:
        """Return which secrets are there."""
        text = content.decode("latin-1") if isinstance(content, bytes) else content
        return {what for part, what in self.known.items() if part in text}

    def check(self, where: str, content: bytes | str) -> None:
        """Raise AssertionError for a secret, without repeating it."""
        assert self.found_in(content) == set(), where


# --- the upstream -------------------------------------------------------------------------------------------------


def echo(request: RecordedRequest) -> list[Step]:
    """Answer, or fail as some providers do: with the credential in the error."""
    if request.method == b"GET":
        return [http_reply(b'{"object":"list","data":[]}')]
    asked = json.loads(request.body)
    wanted = asked.get("user", "")
    if not wanted.startswith("fail"):
        return answer(request)
    credential = (request.headers.get(b"authorization") or b"").decode()
    error = {"error": {"message": f"Incorrect API key provided: {credential}", "type": "x", "code": credential}}
    content = json.dumps(error).encode()
    if wanted == "fail-stream":
        events = b"event: error\ndata: %b\n\n" % content
        return [http_reply(events, fields=((b"Content-Type", b"text/event-stream"),))]
    return [http_reply(content, int(wanted[-3:]))]


def refuse(request: RecordedRequest) -> list[Step]:
    """Fail whatever comes, with the credential in the error and in a header."""
    credential = request.headers.get(b"authorization") or b""
    content = json.dumps({"error": {"message": credential.decode(), "code": "invalid_api_key"}}).encode()
    return [http_reply(content, 401)]


# --- commands -----------------------------------------------------------------------------------------------------


@contextmanager
def watching_processes(hunt: Hunt) -> Iterator[None]:
    """Look at the command lines of all processes, as ``ps`` does, while something runs."""
    over = threading.Event()
    seen: set[bytes] = set()

    def watch() -> None:
        while not over.wait(0.01):
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    seen.add(Path("/proc", pid, "cmdline").read_bytes())
                except OSError:
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert any(b"penstock" in line for line in seen)
    for line in seen:
        hunt.check("a list of processes", line)


@attrs.define(eq=False)
class Shell:
    """Another terminal of the user: what commands print is looked through, but for what they are to show."""

    gateway: RunningGateway
    hunt: Hunt

    async def run(self, *arguments: str, status: int = 0, shows: str = "", **environment: str) -> str:
        """Return what a command prints; ``shows`` names the member that is the secret it makes."""
        more = ("--format", "json") if shows else ()
        done = await self.gateway.run(*arguments, *more, **environment)
        assert done.returncode == status, (arguments, done.stderr)
        out = done.stdout.decode()
        self.hunt.check(f"messages of {arguments}", done.stderr)
        if shows:
            secret = json.loads(out).pop(shows)
            out = out.replace(secret, "")
            self.hunt.check(f"output of {arguments}", out)
            return self.hunt.add(" ".join(arguments[:2]), secret)
        self.hunt.check(f"output of {arguments}", out)
        return out


def given(home: Path, name: str, secret: str) -> str:
    """Write a secret into a file of the user's own."""
    (home / "given").mkdir(exist_ok=True)
    path = home / "given" / name
    path.touch(mode=0o600)
    path.write_text(f"{secret}\n")
    return str(path)


# --- files and answers --------------------------------------------------------------------------------------------


def keepers(home: Path) -> set[Path]:
    return {path for pattern in KEEPERS for path in home.glob(pattern)}


def check_files(home: Path, hunt: Hunt) -> int:
    """Look through every file there is; returns how many."""
    kept = keepers(home)
    count = 0
    for path in sorted(home.rglob("*")):
        if path.is_file():
            mode = stat.S_IMODE(path.stat().st_mode)
            if path in kept:
                assert mode == 0o600, (path, oct(mode))
                continue
            hunt.check(str(path), path.read_bytes())
            count += 1
            if path.name.startswith("penstock.db") or ".db.journal" in str(path):
                assert mode & 0o077 == 0, (path, oct(mode))
    return count


async def check_answers(client: Client, hunt: Hunt) -> int:
    """Ask all that can be read of the API; returns how many answers were looked through."""
    description = await client.api("GET", "/openapi.json")
    paths = [path for path, operations in description["paths"].items() if "get" in operations]
    count = 0
    for path in paths:
        place = path.removeprefix("/api/v1")
        for one in [each async for each in _places(client, place)]:
            reply = await client.request("GET", f"/api/v1{one}", key=client.gateway.token)
            assert reply.status in (200, 400), (one, reply.body)
            hunt.check(f"GET {one}", reply.raw)
            count += 1
    for path in ("/", "/metrics", "/healthz", "/v1/nowhere"):
        hunt.check(path, (await client.get(path)).raw)
    return count


async def _places(client: Client, place: str) -> AsyncIterator[str]:
    """Yield the paths a path with places in it stands for, archived objects too."""
    head, brace, rest = place.partition("{")
    if not brace:
        yield f"{place}?limit=200" if place in ("/audit", "/spend-events") else place
        return
    member = "request_id" if rest.startswith("request_id") else "id"
    tail = rest.partition("}")[2]
    for query in ("", "?archived=true"):
        reply = await client.request("GET", f"/api/v1{head.rstrip('/')}{query}", key=client.gateway.token)
        if reply.status == 200:
            for row in json.loads(reply.body)["data"][:20]:
                yield f"{head}{row[member]}{tail}"


# --- what happens -------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Story:
    """Make secrets by all ways there are, use them rightly and wrongly."""

    gateway: RunningGateway
    hunt: Hunt
    upstream: FakeUpstream
    refusing: FakeUpstream
    keys: dict[str, str] = attrs.field(factory=dict)

    async def make_by_api(self, client: Client) -> None:
        hunt = self.hunt
        price = {"provider": "openai", "model": "*", "effective_at": "2020-01-01T00:00:00Z"}
        await client.make("/prices/overrides", {**price, "rates": {"input": 0, "output": 10**9}})
        for name, upstream in (("up", self.upstream), ("refusing", self.refusing)):
            credential = hunt.add(f"credential of {name}", made_up("sk-"))
            binding = {"name": name, "type": "openai", "base_url": upstream.base_url, "models": [MODEL]}
            made = await client.make("/provider-bindings", {**binding, "credential": credential})
            hunt.check("a binding", json.dumps(made))
        changed = hunt.add("second credential of up", made_up("sk-"))
        shown = await client.api("PATCH", "/provider-bindings/up", {"credential": changed})
        hunt.check("a binding", json.dumps(shown))
        secret = hunt.add("secret of a webhook", made_up("wh-"))
        hook = {"name": "hook", "url": "http://127.0.0.1:9/", "secret": secret}
        hunt.check("a webhook", json.dumps(await client.make("/webhooks", hook)))
        for name, more in (("k", {}), ("bad", {"provider_bindings": ["refusing"]}), ("gone", {})):
            body = {"name": name, "provider_bindings": ["up"], **more}
            self.keys[name] = hunt.add(f"key {name}", (await client.make("/virtual-keys", body))["secret"])
        limited = {"name": "limited", "provider_bindings": ["up"], "rate_limits": {"rpm": 1}}
        self.keys["limited"] = hunt.add("key limited", (await client.make("/virtual-keys", limited))["secret"])
        poor = {"name": "poor", "budget": {"window": "total", "limit_nano_usd": 1, "reserve": "max"}}
        self.keys["poor"] = hunt.add("key poor", (await client.make("/virtual-keys", poor))["secret"])
        rotated = await client.api("POST", "/virtual-keys/k/rotate", {})
        self.keys["rotated"] = hunt.add("key rotated", rotated["secret"])
        await client.api("POST", "/virtual-keys/gone/revoke", {})
        token = await client.make("/api-tokens", {"name": "t", "role": "viewer"})
        hunt.add("api token", token["secret"])

    async def make_once(self, client: Client) -> None:
        """Make a key with an idempotency key: the answer is kept."""
        fields = [(b"Idempotency-Key", b"once"), (b"Authorization", b"Bearer " + client.gateway.token.encode())]
        body = {"name": "once"}
        secret = None
        for _ in range(2):
            await client.raw.send(request_bytes("POST", "/api/v1/virtual-keys", fields, body))
            reply = await client.raw.receive_reply()
            assert reply.status == 201, reply.body
            assert secret in (None, json.loads(reply.body)["secret"])
            secret = json.loads(reply.body)["secret"]
        assert secret is not None
        self.hunt.add("key made once", secret)

    async def make_by_commands(self, shell: Shell) -> None:
        hunt, home = self.hunt, self.gateway.home
        credential = hunt.add("credential from the environment", made_up("sk-"))
        place = ("--base-url", self.upstream.base_url)
        await shell.run("providers", "create", "--name", "by-env", "--type", "openai", "--api-key-env", "MY_KEY",
                        *place, MY_KEY=credential)  # fmt: skip
        await shell.run("providers", "create", "--name", "by-env", "--type", "openai", "--api-key-env", "MY_KEY",
                        *place, MY_KEY=credential)  # fmt: skip
        file = given(home, "credential", hunt.add("credential from a file", made_up("sk-")))
        await shell.run("providers", "update", "by-env", "--api-key-file", file)
        file = given(home, "webhook", hunt.add("webhook secret from a file", made_up("wh-")))
        await shell.run(
            "webhooks", "create", "--name", "by-file", "--post-to", "http://127.0.0.1:9/", "--secret-file", file
        )
        self.keys["cli"] = await shell.run("virtual-keys", "create", "--name", "cli", "--provider", "up",
                                           shows="secret")  # fmt: skip
        self.keys["cli2"] = await shell.run("virtual-keys", "rotate", "cli", "--grace", "0", "--yes", shows="secret")
        token = await shell.run("tokens", "create", "--name", "cli", "--role", "org_admin", shows="secret")
        await shell.run("whoami", PENSTOCK_TOKEN=token, PENSTOCK_URL=f"http://127.0.0.1:{self.gateway.port}")
        await shell.run("login", "--token-file", given(home, "token", token), "--port", str(self.gateway.port))
        wrong = hunt.add("credential where a name should be", made_up("sk-"))
        await shell.run("providers", "create", "--name", "x", "--type", "openai", "--api-key-env", "NO_SUCH_KEY",
                        NO_SUCH_KEY="", OTHER=wrong, status=2)  # fmt: skip
        stranger = hunt.add("a token nobody knows", made_up("ps_at_"))
        await shell.run("whoami", PENSTOCK_TOKEN=stranger, PENSTOCK_URL=f"http://127.0.0.1:{self.gateway.port}",
                        status=1)  # fmt: skip
        for words in ("providers list", "virtual-keys list", "webhooks list", "tokens list", "providers get up",
                      "virtual-keys get cli", "audit list --all", "audit export", "export", "usage",
                      "spend-events list", "providers test up"):  # fmt: skip
            await shell.run(*words.split())
        # The provider refuses the credential, and says which.
        await shell.run("providers", "test", "refusing", "--format", "json")

    async def call(self, client: Client) -> None:
        """Call in all ways that keys can be presented, and be refused in many."""
        hunt, keys = self.hunt, self.keys

        async def ask(key: str, status: int, **members: Any) -> None:
            reply = await client.ask(key, **members)
            assert reply.status == status, (members, reply.body)
            if not members.get("user", "").startswith("fail"):
                hunt.check(f"an answer of status {status}", reply.raw)

        stranger = hunt.add("a key nobody knows", made_up("ps_vk_live_"))
        await ask(stranger, 401)
        await ask(keys["gone"], 403)
        await ask(keys["poor"], 402)
        for key in (keys["k"], keys["rotated"], keys["cli2"]):
            await ask(key, 200)
            await ask(key, 200, stream=True)
        await ask(keys["cli"], 401)
        await ask(keys["limited"], 200)
        await ask(keys["limited"], 429)
        await ask(keys["rotated"], 400, model=None)
        for wanted in ("fail-401", "fail-403", "fail-429", "fail-500"):
            await ask(keys["rotated"], int(wanted[-3:]), user=wanted)
        await client.ask(keys["rotated"], user="fail-stream", stream=True)
        await client.ask(keys["bad"], user="fail-401")
        # As a token of the API, in a query, in every header, on the wrong paths.
        reply = await client.request("GET", "/api/v1/whoami", key=keys["rotated"])
        assert reply.status == 401
        hunt.check("a refusal of the API", reply.raw)
        for path in (f"/v1beta/models/{MODEL}:generateContent?key={keys['rotated']}", f"/v1/models?key={keys['gone']}"):
            for method, body in (("POST", {"contents": []}), ("GET", b"")):
                hunt.check(path, (await client.request(method, path, body)).raw)
        for name in (b"X-Api-Key", b"Api-Key", b"X-Goog-Api-Key", b"Cookie"):
            fields = [(name, keys["rotated"].encode())]
            await client.raw.send(request_bytes("POST", "/v1/chat/completions", fields, chat()))
            hunt.check(name.decode(), (await client.raw.receive_reply()).raw)

    async def reload(self) -> None:
        """Reload a good configuration, and one that is at fault where a secret stands."""
        process = self.gateway.process
        process.send_signal(signal.SIGHUP)
        await self.gateway.said("reloaded")
        file = self.gateway.home / "penstock.toml"
        good = file.read_text()
        pepper = self.hunt.add("pepper of a bad configuration", made_up("pepper-"))
        file.write_text(f'{good}\n[plugins.store]\npepper = "{pepper}"\nencryption_key = "{pepper[::-1]}"\n')
        self.hunt.add("encryption key of a bad configuration", pepper[::-1])
        process.send_signal(signal.SIGHUP)
        await self.gateway.said("reload refused, the last good configuration stays")
        file.write_text(good)
        process.send_signal(signal.SIGHUP)
        await self.gateway.said("reloaded", 2)


@asynccontextmanager
async def upstreams() -> AsyncIterator[tuple[FakeUpstream, FakeUpstream]]:
    async with FakeUpstream([echo], repeat=True) as upstream, FakeUpstream([refuse], repeat=True) as refusing:
        yield upstream, refusing


def add_own(home: Path, hunt: Hunt) -> None:
    """Look for what the gateway made for itself, too."""
    for ending in ("admin-token", "key", "pepper"):
        lines: Iterable[str] = (home / f"penstock.db.{ending}").read_text().split()
        for line in lines:
            hunt.add(f"the gateway's own {ending}", line)


async def test_no_secret_is_in_the_clear_anywhere(tmp_path: Path) -> None:
    hunt = Hunt()
    environment = hunt.add("credential of the gateway's environment", made_up("sk-"))
    async with upstreams() as (upstream, refusing):
        given_env = {"OPENAI_API_KEY": environment, "OPENAI_BASE_URL": upstream.base_url}
        async with running(tmp_path, spans="console", environment=given_env) as gateway:
            await gateway.listening()
            add_own(tmp_path, hunt)
            client = await gateway.client()
            shell = Shell(gateway, hunt)
            story = Story(gateway, hunt, upstream, refusing)
            with watching_processes(hunt):
                await story.make_by_api(client)
                await story.make_once(client)
                await story.make_by_commands(shell)
                await story.call(client)
                await story.reload()
                await shell.run("store", "backup", "plain.backup")
                await shell.run("store", "backup", "whole.backup", "--with-keys")
            assert await check_answers(client, hunt) > 60
            assert check_files(tmp_path, hunt) > 5
            await gateway.kill()  # with journal and write-ahead log as they are
        assert check_files(tmp_path, hunt) > 5
        async with running(tmp_path, environment=given_env) as gateway:
            await gateway.listening()
            await Shell(gateway, hunt).run("store", "rotate-key")
            add_own(tmp_path, hunt)
            client = await gateway.client()
            assert (await client.ask(story.keys["rotated"])).status == 200
            await check_answers(client, hunt)
            client.close()
            assert await gateway.stop() == 0
    assert check_files(tmp_path, hunt) > 5
    said = {line["event"] for line in gateway.events}
    assert "listening" in said
    for one in (upstream, refusing):  # the credentials were used, so they were there to be leaked
        assert {len(request.headers.get(b"authorization") or b"") for request in one.requests} == {
            len("Bearer sk-") + 48
        }


def test_what_a_command_line_is_given_by_mistake_is_not_repeated(tmp_path: Path) -> None:
    hunt = Hunt()
    secret = hunt.add("credential as an argument", made_up("sk-"))
    for arguments in (["--api-key-env", secret], ["--api-key", secret], ["--api-key-file", f"/nowhere/{secret[:3]}"]):
        done = subprocess.run(
            [str(PENSTOCK), "providers", "create", "--name", "x", "--type", "openai", *arguments],
            capture_output=True, env=user(tmp_path), check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode != 0
        hunt.check("what a command says", done.stdout + done.stderr)
