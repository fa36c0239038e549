"""The documentation: complete, current, and true where it can be run."""

from __future__ import annotations

import gzip
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import attrs
import click
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

import penstock
from penstock import hookspecs, plugins
from penstock.cli import cli
from penstock.config import GatewayConfig, read_document
from penstock.endpoints import ALL
from penstock.errors import STATUS_OF_CODE
from penstock.hooks import ONCE, PER_EXCHANGE
from penstock.structuring import structure
from penstock.testing import FakeUpstream, Harness, check_plugin, http_reply, stream_reply
from penstock_plugins.management.faults import STATUS_OF_CODE as MANAGEMENT_CODES
from penstock_plugins.management.permissions import ACTIONS, ROLES
from penstock_plugins.management.rest.routes import Route
from penstock_plugins.management.rest.table import ROUTES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("contrib/*/*.md")])
_FENCE = re.compile(r"^```(\S*)[ ]?(.*?)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(language: str, about: str | None = None) -> list[Any]:
    """Return the fenced blocks of a language as test parameters (page, what follows the language, text)."""
    return [
        pytest.param(page, found[2], found[3], id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, found in enumerate(_FENCE.finditer(page.read_text(encoding="utf-8")))
        if found[1] == language and (about is None or found[2] == about)
    ]


@pytest.fixture(scope="module")
def reference() -> Iterator[ModuleType]:
    """Import docs/generate.py as running it does."""
    sys.path.insert(0, str(DOCS))
    yield importlib.import_module("generate")
    sys.path.remove(str(DOCS))


# --- complete -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [*ONCE, *PER_EXCHANGE])
def test_hook_is_documented(hook: str) -> None:
    assert f"### `{hook}`" in text_of("plugins/hooks.md")


def test_every_hook_of_the_specification_is_known_to_core() -> None:
    specified = {name for name, member in vars(hookspecs).items() if hasattr(member, "penstock_spec")}
    assert specified == {*ONCE, *PER_EXCHANGE}


def test_every_setting_is_documented_with_its_meaning() -> None:
    page = text_of("configuration.md")
    for field in attrs.fields(GatewayConfig):
        assert f"| `{field.name}` |" in page
    without = [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert without == []


@pytest.mark.parametrize("name", sorted(plugins.installed()))
def test_bundled_plugin_and_its_settings_are_documented(name: str) -> None:
    point = plugins.installed()[name]
    if not point.value.startswith("penstock_plugins."):
        assert any(name in page.read_text(encoding="utf-8") for page in ROOT.glob("contrib/*/README.md"))
        return
    _, found, section = text_of("configuration.md").partition(f"\n## `{name}`\n")
    assert found
    config = getattr(point.load(), "Config", None)
    for field in attrs.fields(config) if config is not None else ():
        assert f"| `{field.name}` |" in section.partition("\n## ")[0]


def sources() -> Iterator[str]:
    for folder in ("core/penstock", "plugins/penstock_plugins"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "testing" not in path.parts and "mock" not in path.parts:
                yield path.read_text(encoding="utf-8")


def test_every_response_header_is_documented() -> None:
    page = text_of("headers.md").lower()
    names: set[str] = set()
    for source in sources():
        names |= {f"x-penstock-{name}" for name in re.findall(r'stem \+ b"([A-Za-z-]+):', source)}
        names |= {f"x-penstock-{name}" for name in re.findall(r"X-(?:%b|Penstock|\{\w+\})-([A-Za-z-]+)", source)}
        names |= set(re.findall(r'\(b"(x-should-retry|retry-after|request-id|allow)",', source))
    assert len(names) > 10
    assert sorted(name for name in names if f"`{name.lower()}`" not in page) == []


@pytest.mark.parametrize("code", sorted(STATUS_OF_CODE))
def test_error_code_is_documented_with_its_status(code: str) -> None:
    assert f"| `{code}` | {STATUS_OF_CODE[code]} |" in text_of("errors.md")


def test_every_code_that_is_raised_is_in_the_table() -> None:
    raised = {code for source in sources() for code in re.findall(r'RequestError\(\s*"(\w+)"', source)}
    assert raised
    assert raised <= set(STATUS_OF_CODE)


@pytest.mark.parametrize("endpoint", ALL, ids=lambda endpoint: endpoint.path)
def test_endpoint_is_documented(endpoint: penstock.Endpoint) -> None:
    methods = ", ".join(method.decode() for method in endpoint.methods)
    assert f"| {methods} | `{endpoint.path}` | `{endpoint.dialect}` |" in text_of("endpoints.md")


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_route_of_the_management_api_is_documented_with_its_permission(route: Route) -> None:
    needed = {"public": "none", "any": "any token"}.get(route.permission, f"`{route.permission}`")
    section = text_of("api.md").partition(f"\n## {route.tag}\n")[2].partition("\n## ")[0]
    assert f"| {route.method} `{route.path}` | {needed} |" in section
    for name in route.query:
        assert f"`{name}`" in section


def test_every_member_of_the_management_api_says_what_it_means() -> None:
    rows = [line for line in text_of("api.md").splitlines() if line.startswith("| `")]
    assert len(rows) > 200
    assert [line for line in rows if line.endswith("|  |")] == []


def test_every_code_of_the_management_api_is_documented() -> None:
    table = text_of("api.md").partition("\n## Errors\n")[2].partition("\n## ")[0]
    for code, status in MANAGEMENT_CODES.items():
        assert re.search(rf"^\| {status} \| .*`{code}`", table, re.MULTILINE)


def test_every_permission_and_role_is_documented() -> None:
    page = text_of("permissions.md")
    assert [resource for resource in ACTIONS if f"| `{resource}` |" not in page] == []
    assert [role for role in ROLES if f"`{role}`" not in page] == []
    actions = {action for found in ACTIONS.values() for action in found}
    assert [action for action in actions if f"`{action}`" not in page] == []


def commands(group: click.Group, path: str) -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}"


def test_every_command_is_documented() -> None:
    assert entry_points(group="penstock.commands")
    page = text_of("cli.md")
    assert [name for name in commands(cli, "penstock") if f"\n## {name}\n" not in page] == []


def test_every_public_name_is_documented() -> None:
    api, tools = text_of("plugins/api.md"), text_of("plugins/testing-api.md")
    assert [name for name in penstock.__all__ if f"| `{name}` | " not in api] == []
    assert [name for name in penstock.testing.__all__ if f"| `{name}` | " not in tools] == []


@pytest.mark.parametrize(
    ("module", "page"), [(penstock, "plugins/api.md"), (penstock.testing, "plugins/testing-api.md")]
)
def test_every_public_class_and_function_is_shown_in_detail(module: Any, page: str) -> None:
    text = text_of(page)
    for name in module.__all__:
        thing = getattr(module, name)
        if isinstance(thing, type):
            assert f"\n### `{name}`\n" in text
        elif inspect.isfunction(thing):
            assert f"\n{name}(" in text


@pytest.mark.parametrize("page", ["plugins/api.md", "plugins/tools.md", "plugins/testing-api.md"])
def test_every_row_and_signature_of_the_reference_says_what_it_is_about(page: str) -> None:
    lines = text_of(page).splitlines()
    assert [line for line in lines if line.startswith("| `") and "|  |" in line] == []
    assert [line for line, below in pairwise(lines) if re.search(r"^\w+: |\) -> ", line) and below == "```"] == []


def test_validity_of_every_field_of_an_exchange_is_documented(reference: ModuleType) -> None:
    contract = importlib.import_module("reference.contract")
    shown = " ".join(fields for _, _, fields, _ in contract.VALIDITY).split()
    assert sorted(shown) == sorted(field.name for field in attrs.fields(penstock.Exchange) if field.name[0] != "_")


@pytest.mark.parametrize(
    "folder",
    [
        *("core/penstock", "core/penstock/dialects", "core/penstock/governance", "core/penstock/upstream"),
        *(f"plugins/penstock_plugins/{name}" for name in ("store", "budgets")),
    ],
)
def test_every_source_file_is_on_the_tour(folder: str) -> None:
    page = text_of("tour.md")
    files = {path.name for path in (ROOT / folder).iterdir() if path.suffix == ".py"} - {"__init__.py"}
    assert sorted(name for name in files if f"`{name}`" not in page) == []


def test_every_file_the_tour_names_by_its_last_name_exists() -> None:
    named = set(re.findall(r"`([\w/]+\.py)`", text_of("tour.md")))
    there = [path.as_posix() for folder in ("core", "plugins", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(named) > 50
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in there)] == []


def test_lines_of_the_tour_can_be_read() -> None:
    assert [line for line in text_of("tour.md").splitlines() if len(line) > 140] == []


def test_every_package_of_plugins_is_on_the_tour() -> None:
    page = text_of("tour.md")
    packages = [path.parent.name for path in (ROOT / "plugins/penstock_plugins").glob("*/__init__.py")]
    assert [name for name in packages if f"plugins/penstock_plugins/{name}/" not in page] == []


def test_files_the_tour_names_exist() -> None:
    named = re.findall(r"`((?:tests|plugins|core)/[\w/]+(?:\.py|/))`", text_of("tour.md"))
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


# --- current ------------------------------------------------------------------------------------------------


def test_generated_pages_are_current(reference: ModuleType) -> None:
    assert sorted(reference.stale_pages()) == []


def test_generated_pages_say_how_to_make_them(reference: ModuleType) -> None:
    for name in reference.PAGES:
        assert "`python docs/generate.py`" in text_of(name).partition("\n")[0]


def test_generator_checks_from_the_command_line() -> None:
    finished = subprocess.run(
        [sys.executable, str(DOCS / "generate.py"), "--check"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (finished.returncode, finished.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        place, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", place):
            continue
        goal = (page.parent / place).resolve() if place else page
        if not goal.exists() or (anchor and anchor not in anchors_of(goal)):
            broken.append(link)
    assert broken == []


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings as forges make them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_can_be_reached_from_the_index() -> None:
    seen: set[Path] = set()
    waiting = [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or not page.exists():
            continue
        seen.add(page)
        links = _LINK.findall(page.read_text(encoding="utf-8"))
        waiting += [
            (page.parent / link.partition("#")[0]).resolve() for link in links if ".md" in link and ":" not in link
        ]
    assert set(DOCS.rglob("*.md")) - seen == set()


# --- true ---------------------------------------------------------------------------------------------------

_SAMPLE = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(("page", "about", "block"), blocks("toml"))
def test_toml_is_a_configuration(
    page: Path, about: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read the block, and build the tables of its plugins; a block may leave out what other pages show."""
    import tomllib  # noqa: PLC0415

    document = tomllib.loads(block)
    named = document.get("gateway", {}).get("plugins")
    if named is None and "plugins" in document:
        document.setdefault("gateway", {})["plugins"] = list(document["plugins"])
    configuration = read_document(document, source=str(page), folder=tmp_path, environment={})
    for variable in re.findall(r'env = "(\w+)"', block):
        monkeypatch.setenv(variable, _SAMPLE)
    for name in re.findall(r'file = "(\w+)"', block):
        (tmp_path / name).write_text(_SAMPLE)
    for name in configuration.plugins:
        config = getattr(plugins.installed()[name].load(), "Config", None) if name in plugins.installed() else None
        if config is not None:
            read = structure(configuration.plugin_table(name), config, where=name, folder=tmp_path)
            assert isinstance(read, config)


@pytest.mark.parametrize(("page", "about", "block"), blocks("python"))
def test_python_compiles(page: Path, about: str, block: str) -> None:
    assert compile(block, str(page), "exec")


def test_python_marked_as_runnable_runs() -> None:
    for parameter in blocks("python", "run"):
        page, _, block = parameter.values
        exec(compile(block, str(page), "exec"), {"__name__": "example"})


GUIDE = [parameter for parameter in blocks("python") if str(parameter.values[1]).endswith(".py")]
WRITTEN = [parameter for parameter in GUIDE if not str(parameter.values[1]).startswith("test_")]


@pytest.mark.parametrize(("page", "about", "block"), WRITTEN)
def test_plugin_of_the_guide_keeps_the_contract(
    page: Path, about: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where relative paths of a configuration without a file are
    (tmp_path / about).write_text(block)
    _, kind, _ = plugins.find(f"./{about}", tmp_path)
    check_plugin(kind, translates={"openai.chat"} if about == "plainly.py" else ())


@pytest.mark.parametrize("name", ["writing.md", "providers.md"])
def test_tests_of_the_guide_pass(name: str, tmp_path: Path) -> None:
    page = DOCS / "plugins" / name
    for parameter in GUIDE:
        if parameter.values[0] == page:
            (tmp_path / str(parameter.values[1])).write_text(str(parameter.values[2]))
    assert list(tmp_path.glob("test_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_guide_shows_each_kind_of_plugin() -> None:
    assert [parameter.values[1] for parameter in WRITTEN] == [
        "regional.py", "plainly.py", "guard.py", "stamp.py", "ledger.py", "redact.py", "rename.py", "calm.py", "acme.py"
    ]  # fmt: skip


def guide(name: str, folder: Path) -> type[Any]:
    """Return a plugin class the guide shows."""
    (folder / name).write_text(next(str(found.values[2]) for found in WRITTEN if found.values[1] == name))
    return plugins.find(f"./{name}", folder)[1]


@pytest.mark.anyio
@pytest.mark.parametrize("is_gzipped", [False, True])
async def test_rename_of_the_guide_edits_text_only(tmp_path: Path, is_gzipped: bool) -> None:
    def said(text: str) -> bytes:
        return b'data: {"a":1.0,"choices":[{"delta":{"content":"%b"}}]}\n\n' % text.encode()

    whole = b'{ "id":"Bluebird", "choices":[{"message":{"content":"a \\u0042luebird\\n"}}] }'
    events = (said("hi"), b"data: Bluebird\n\n", said("the Bluebird"), b"data: [DONE]\n\n")
    fields = ((b"Content-Encoding", b"gzip"),) if is_gzipped else ()
    upstream = FakeUpstream(
        [stream_reply(*events), [http_reply(gzip.compress(whole) if fields else whole, 200, fields)]]
    )
    async with Harness([guide("rename.py", tmp_path)], upstream=upstream) as gateway:
        asked = {"model": "m", "messages": [], "stream": True, "stream_options": {"include_usage": True}}
        reply = await gateway.request("POST", "/v1/chat/completions", body=asked)
        assert reply.body == b"".join((*events[:2], said("the Kingfisher"), events[3]))
        reply = await gateway.request("POST", "/v1/chat/completions", body={"model": "m", "messages": []})
        assert reply.body == whole.replace(b"\\u0042luebird", b"Kingfisher")


@pytest.mark.anyio
async def test_ledger_of_the_guide_has_written_every_line_once_it_is_left(tmp_path: Path) -> None:
    upstream = FakeUpstream([[http_reply(b'{"usage":{"prompt_tokens":3,"completion_tokens":2}}')]])
    config = {"ledger": {"file": str(tmp_path / "out.jsonl")}}
    async with Harness([guide("ledger.py", tmp_path)], config, upstream) as gateway:
        await gateway.request("POST", "/v1/chat/completions", body={"model": "m", "messages": []})
        await gateway.request("POST", "/v1/nothing/here", body={})
        await gateway.request("GET", "/v1/models", {"Authorization": "Bearer x"})
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = [(line["status"], line["error"], line["key"], line["model"], line["tokens"], line["end"]) for line in lines]
    assert found == [
        (200, None, "test", "m", [3, 2], "complete"),
        (404, "not_found", None, None, None, None),
        (401, "invalid_api_key", None, None, None, None),
    ]


@pytest.mark.anyio
async def test_upstream_of_the_guide_stands_in_for_a_provider(tmp_path: Path) -> None:
    ((block,),) = [parameter.values[2:] for parameter in blocks("python", "upstream")]
    (tmp_path / "upstream.py").write_text(str(block))
    command = [sys.executable, str(tmp_path / "upstream.py")]
    async with await anyio.open_process(command, stderr=None) as process:
        assert process.stdout is not None
        printed = BufferedByteReceiveStream(process.stdout)
        try:
            line = await printed.receive_until(b'"\n', 200)
            base_url = line.decode().removeprefix('base_url = "')
            binding = {"name": "b", "type": "regional", "base_url": base_url, "credential": "k"}
            config = {"routing": {"bindings": [binding]}}
            async with Harness([guide("regional.py", tmp_path)], config) as gateway:
                reply = await gateway.request("POST", "/v1/chat/completions", body={"model": "m", "messages": []})
            assert reply.json()["object"] == "chat.completion"
            line = await printed.receive_until(b"\r\n", 200)
            assert line == b"POST /v1/chat/completions?region=eu HTTP/1.1"
        finally:
            process.terminate()


@pytest.mark.anyio
@pytest.mark.parametrize("coding", ["identity", "gzip"])
async def test_calm_of_the_guide_edits_coded_requests_too(tmp_path: Path, coding: str) -> None:
    body = b'{"model":"m", "temperature": 1.5,"messages":[]}'
    upstream = FakeUpstream([[http_reply()]])
    async with Harness([guide("calm.py", tmp_path)], upstream=upstream) as gateway:
        headers = {"Content-Type": "application/json", "Content-Encoding": coding}
        sent = gzip.compress(body) if coding == "gzip" else body
        assert (await gateway.request("POST", "/v1/chat/completions", headers, sent)).status == 200
    assert upstream.requests[0].body == body.replace(b"1.5", b"0")
    assert b"content-encoding" not in upstream.requests[0].headers


def test_readme_has_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/penstock demo"
    second = (
        "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt '.[dev]' ./contrib/penstock-echo"
        " && .venv/bin/pytest -n auto"
    )
    assert f"```sh\n{first}\n```" in readme
    assert f"```sh\n{second}\n```" in readme


def test_constraints_are_pins_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line)] == []
