"""What a hostile or careless caller of the management plane tries, and what must come of it."""

from __future__ import annotations

import hashlib
import hmac
import importlib.metadata
import io
import json
import logging
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from demo_process import PENSTOCK
from management_client import Api, running_api
from penstock import ConfigurationError
from penstock.cli import COMMAND_GROUP, cli
from penstock.governance import ObjectStore, Scope, Vault
from penstock.log import Log, taking_library_records
from penstock_plugins.demo.folder import prepare
from penstock_plugins.management.catalogue import RESOURCE_OF
from penstock_plugins.management.resources import Draft
from penstock_plugins.management.rest.asks import Answer, Ask
from penstock_plugins.management_cli.client import Api as Client
from penstock_plugins.management_cli.login import sends_openly
from penstock_plugins.management_cli.profile import Access, find_access, write_profile

pytestmark = pytest.mark.anyio

CREDENTIAL = "sk-very-secret-credential-9876"


async def refused(api: Api, method: str, path: str, body: Any = None) -> tuple[int, str]:
    answered = await api.ask(method, path, body)
    assert answered.status >= 400, answered.raw
    return answered.status, answered.error["message"]


async def models_status(api: Api, secret: str) -> int:
    reply = await api.harness.request("GET", "/v1/models", [(b"host", b"g"), (b"x-api-key", secret.encode())])
    return reply.status


def standing_clock(api: Api) -> Any:
    """Have the gateway's time stand still, and return its services."""
    services = api.harness.gateway.generation.services
    now = services.clock()
    services.clock = lambda: now
    return services


# --- keys -----------------------------------------------------------------------------------------------------


async def test_a_key_stops_when_its_user_or_service_account_is_archived() -> None:
    async with running_api() as api:
        user = await api.make("/users", {"slug": "ann"})
        account = await api.make("/service-accounts", {"slug": "bot"})
        for path, principal in (("users", user), ("service-accounts", account)):
            key = await api.make("/virtual-keys", {"name": path, "principal_id": principal["id"]})
            assert await models_status(api, key["secret"]) == 200
            assert (await api.ask("DELETE", f"/{path}/{principal['id']}")).status == 200
            assert await models_status(api, key["secret"]) == 401


async def test_a_key_without_a_principal_to_fall_back_on_says_which_member_is_missing() -> None:
    async with running_api() as api:
        organization = await api.make("/organizations", {"slug": "bare"})
        team = await api.make("/teams", {"slug": "t", "organization_id": organization["id"]})
        project = await api.make("/projects", {"slug": "p", "team_id": team["id"]})
        body = {"name": "k", "project_id": project["id"]}
        assert await refused(api, "POST", "/virtual-keys", body) == (400, "principal_id: is required")


# --- credentials ----------------------------------------------------------------------------------------------


async def test_a_stored_credential_is_led_elsewhere_only_by_who_may_call_with_it() -> None:
    async with running_api() as api:
        binding = await api.make("/provider-bindings", {"name": "b", "type": "openai", "credential": CREDENTIAL})
        one = f"/provider-bindings/{binding['id']}"
        editor = await api.token_for(permissions=["gatewayProviders:view", "gatewayProviders:update"])
        for patch in ({"base_url": "http://127.0.0.1:9"}, {"proxy": "http://127.0.0.1:9"}):
            status, message = await refused(editor, "PATCH", one, patch)
            assert (status, "gatewayProviders:manage" in message) == (403, True)
        assert (await editor.ask("PATCH", one, {"models": ["m"]})).status == 200
        assert (
            await editor.ask("PATCH", one, {"base_url": "http://127.0.0.1:9", "credential": "another-one-1"})
        ).status == 200
        assert (await api.ask("PATCH", one, {"base_url": "http://127.0.0.1:8"})).status == 200


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "X_Goog_Api_Key", "cookie"])
async def test_no_credential_is_kept_in_the_open_as_an_extra_header(name: str) -> None:
    async with running_api() as api:
        body = {"name": "b", "type": "openai", "credential": CREDENTIAL, "extra_headers": {name: "Bearer hidden"}}
        status, message = await refused(api, "POST", "/provider-bindings", body)
        assert (status, "give credential" in message, "hidden" in message) == (400, True, False)


@pytest.mark.parametrize(
    "host",
    ["169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "[::ffff:169.254.169.254]", "[fe80::1]"],
)
async def test_nobody_has_the_gateway_ask_what_gives_out_the_credentials_of_its_machine(host: str) -> None:
    async with running_api() as api:
        body = {"name": "b", "type": "openai", "credential": CREDENTIAL}
        for member in ("base_url", "proxy"):
            status, message = await refused(api, "POST", "/provider-bindings", {**body, member: f"http://{host}/"})
            assert (status, message) == (400, f"{member}: must not be a link-local address")
        hook = {"name": "w", "url": f"https://{host}/hook"}
        assert await refused(api, "POST", "/webhooks", hook) == (400, "url: must not be a link-local address")
        await api.make("/provider-bindings", {**body, "base_url": "http://10.0.0.7:8000"})


async def test_a_rehearsed_change_of_a_binding_leaves_its_address_in_force_alone() -> None:
    async with running_api() as api:
        body = {"name": "b", "type": "openai", "credential": CREDENTIAL, "base_url": "http://127.0.0.1:9"}
        binding = await api.make("/provider-bindings", body)
        provider: Any = api.harness.gateway.generation.services.providers.get("openai")
        before = provider._addresses[binding["id"]]
        document = {"provider_bindings": [{**body, "base_url": "http://127.0.0.1:8"}]}
        rehearsed = await api.ask("POST", "/config/apply", {"document": document, "dry_run": True})
        assert [change["action"] for change in rehearsed.body["changes"]] == ["update"]
        assert provider._addresses[binding["id"]] is before


async def test_nothing_on_its_way_through_the_plane_shows_secrets_when_printed() -> None:
    body = {"credential": CREDENTIAL}
    draft = Draft(RESOURCE_OF["provider_binding"], "gpc_1", None, None, Scope("org_1"), body)
    ask = Ask("POST", "/x", {}, {}, body, b"", None, None, None, "req_1", "api")
    assert CREDENTIAL not in f"{draft!r}{ask!r}{Answer(body)!r}"


async def test_what_is_kept_of_a_request_that_may_be_repeated_cannot_be_guessed_from_outside() -> None:
    async with running_api() as api:
        services = api.harness.gateway.generation.services
        store: ObjectStore = services.get(ObjectStore)  # type: ignore[type-abstract]
        kept: list[bytes] = []
        body = json.dumps({"name": "b", "type": "mock", "credential": CREDENTIAL}).encode()
        made = await api.ask("POST", "/provider-bindings", raw=body, idempotency_key="k")
        assert made.status == 201

        def look(tx: Any) -> None:
            name = f"{me['id']}:{hashlib.sha256(b'k').hexdigest()}"
            kept.extend(tx.remembered(name, now_ms=0))

        me = await api.get("/whoami")
        await store.read(look)
        fingerprint = kept[0]
        asked = b"POST\n/provider-bindings\n" + body
        assert fingerprint not in {hashlib.sha256(part).digest() for part in (asked, body)}
        assert fingerprint == hmac.digest(services.get(Vault).pepper, b"idempotency\n" + asked, "sha256")  # type: ignore[type-abstract]
        again = await api.ask("POST", "/provider-bindings", raw=body, idempotency_key="k")
        assert again.raw == made.raw
        other = await api.ask("POST", "/provider-bindings", raw=body + b" ", idempotency_key="k")
        assert (other.status, other.error["code"]) == (409, "idempotency_mismatch")


# --- tokens ---------------------------------------------------------------------------------------------------


async def tenant(api: Api) -> tuple[str, str, str]:
    """Make an organization with a project and a user; return their ids."""
    organization = await api.make("/organizations", {"slug": "acme"})
    team = await api.make("/teams", {"slug": "t", "organization_id": organization["id"]})
    project = await api.make("/projects", {"slug": "p", "team_id": team["id"]})
    user = await api.make("/users", {"slug": "u", "organization_id": organization["id"]})
    return organization["id"], project["id"], user["id"]


async def test_a_token_that_follows_the_roles_of_a_user_stays_within_its_scope() -> None:
    async with running_api() as api:
        organization_id, project_id, user_id = await tenant(api)
        token = await api.token_for(scope_id=project_id, user_id=user_id)
        roles = [{"role": "org_admin", "scope_id": organization_id}]
        assert (await api.ask("PATCH", f"/users/{user_id}", {"roles": roles})).status == 200
        grants = (await token.get("/whoami"))["grants"]
        assert [grant["scope_id"] for grant in grants] == [project_id]
        assert (await token.ask("POST", "/teams", {"slug": "x"})).status == 403
        assert (
            await token.ask("POST", "/budgets", {"scope": "project", "window": "day", "limit_usd": "1"})
        ).status == 201


async def test_a_token_that_follows_roles_is_made_only_by_who_holds_all_they_may_become() -> None:
    async with running_api() as api:
        _, project_id, user_id = await tenant(api)
        maker = await api.token_for(permissions=["apiTokens:manage", "organization:view"], scope_id=project_id)
        status, message = await refused(maker, "POST", "/api-tokens", {"name": "sleeper", "user_id": user_id})
        assert (status, "nobody grants more than he holds" in message) == (403, True)


async def test_a_token_makes_none_that_outlives_it() -> None:
    async with running_api() as api:
        end = "2100-01-01T00:00:00Z"
        short = await api.token_for(permissions=["apiTokens:manage"], expires_at=end)
        for expires_at in (None, "2100-01-01T00:00:01Z"):
            body = {"name": "heir", "permissions": ["apiTokens:view"], "expires_at": expires_at}
            assert (await refused(short, "POST", "/api-tokens", body))[0] == 403
        made = await short.make("/api-tokens", {"name": "heir", "permissions": ["apiTokens:view"], "expires_at": end})
        assert (await refused(short, "PATCH", f"/api-tokens/{made['id']}", {"expires_at": None}))[0] == 403
        assert (await short.ask("PATCH", f"/api-tokens/{made['id']}", {"name": "renamed"})).status == 200


async def test_what_is_of_the_installation_is_not_in_an_organizations_audit() -> None:
    async with running_api() as api:
        admin = await api.token_for(role="org_admin", scope_id=(await api.get("/organizations/default"))["id"])
        await api.make("/api-tokens", {"name": "root", "role": "viewer", "scope_id": "*"})
        names = [entry["after"]["name"] for entry in (await admin.get("/audit?kind=api_token"))["data"]]
        assert "root" not in names
        assert len(names) == 1
        everything = (await api.get("/audit?kind=api_token"))["data"]
        assert "root" in [entry["after"]["name"] for entry in everything]


@pytest.mark.parametrize("path", ["/provider-bindings", "/evaluators"])
async def test_only_tokens_are_for_the_whole_installation(path: str) -> None:
    async with running_api() as api:
        status, message = await refused(api, "POST", path, {"name": "x", "type": "mock", "scope_id": "*"})
        assert (status, message) == (400, "scope_id: must be an organization, team or project")


# --- requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "raw"),
    [("POST", "/teams", b"{"), ("GET", "/teams?nope=1", None), ("PATCH", "/teams/default", b"[]")],
)
async def test_who_presents_no_token_learns_nothing_about_the_request(
    method: str, path: str, raw: bytes | None
) -> None:
    async with running_api() as api:
        answered = await api.holding(None).ask(method, path, raw=raw)
        assert (answered.status, answered.headers.get(b"www-authenticate")) == (401, b"Bearer")
        assert (await api.ask(method, path, raw=raw)).status == 400


async def test_no_path_redirects_to_where_the_host_field_says() -> None:
    async with running_api() as api:
        answered = await api.ask("GET", "/teams/")
        assert (answered.status, answered.headers.get(b"location")) == (404, None)


async def test_a_method_nobody_knows_is_not_allowed() -> None:
    async with running_api() as api:
        answered = await api.ask("BREW", "/teams")
        assert (answered.status, answered.headers.get(b"allow")) == (405, b"GET, HEAD, OPTIONS, POST")


async def test_an_encoded_slash_is_part_of_a_name_and_never_of_the_route() -> None:
    async with running_api() as api:
        assert (await api.get("/projects/default%2Fdefault"))["slug"] == "default"
        await api.make("/virtual-keys", {"name": "victim"})
        before = (await api.get("/virtual-keys/victim"))["display_prefix"]
        assert (await api.ask("POST", "/virtual-keys/victim%2frotate", {})).status == 405
        assert (await api.get("/virtual-keys/victim"))["display_prefix"] == before
        await api.make("/virtual-keys", {"name": "victim/spend"})
        assert (await api.get("/virtual-keys/victim%2Fspend"))["name"] == "victim/spend"


@pytest.mark.parametrize("deep", [b'{"a":' * 900 + b"1" + b"}" * 900, b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"])
async def test_a_body_nested_beyond_measure_is_refused(deep: bytes) -> None:
    async with running_api() as api:
        raw = b'{"name":"e","type":"x","settings":%b}' % deep
        answered = await api.ask("POST", "/evaluators", raw=raw)
        assert (answered.status, "nested" in answered.error["message"]) == (400, True)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/virtual-keys", {"name": "k", "tags": list(range(100_000))}, "tags"),
        ("/virtual-keys", {"name": "k", "rate_limits": {f"rpn{n}": 1 for n in range(50_000)}}, "rate_limits"),
        ("/virtual-keys", {"name": "k", "provider_bindings": ["m"] * 5_000}, "provider_bindings"),
        ("/groups", {"slug": "g", "member_ids": ["default"] * 5_000}, "member_ids"),
    ],
)
async def test_what_holds_too_much_is_refused_before_each_item_is_looked_at(
    path: str, body: dict[str, Any], field: str
) -> None:
    async with running_api() as api:
        await api.make("/provider-bindings", {"name": "m", "type": "mock"})
        status, message = await refused(api, "POST", path, body)
        assert (status, message.startswith(f"{field}: holds at most 500, not ")) == (400, True)


async def test_a_refusal_names_some_faults_and_not_a_hundred_thousand() -> None:
    async with running_api() as api:
        body = {"name": "k", "tags": [1] * 400, "y" * 100_000: 1}
        assert len((await refused(api, "POST", "/virtual-keys", body))[1]) < 2_000
        del body["y" * 100_000]
        assert len((await refused(api, "POST", "/virtual-keys", body))[1]) < 2_000


async def test_what_anybody_may_read_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_api() as api:
        first = await api.holding(None).ask("GET", "/openapi.json")
        monkeypatch.delattr("penstock_plugins.management.openapi.document")
        second = await api.holding(None).ask("GET", "/openapi.json")
        assert (first.status, second.status) == (200, 200)
        assert first.raw == second.raw


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/prices?provider=openai&model=gpt-5&at=yesterday", "at: must be a time"),
        ("/usage?bucket=hour&since=1970-01-01T00:00:00Z&until=2260-01-01T00:00:00Z", "bucket: asks for more than"),
    ],
)
async def test_times_that_cannot_be_answered_are_refused(path: str, message: str) -> None:
    async with running_api() as api:
        status, found = await refused(api, "GET", path)
        assert (status, found.startswith(message)) == (400, True)


@pytest.mark.parametrize("path", ["/spend-events", "/usage", "/virtual-keys/k/spend"])
async def test_times_beyond_what_the_ledger_counts_in_are_answered(path: str) -> None:
    async with running_api() as api:
        await api.make("/virtual-keys", {"name": "k"})
        await api.get(f"{path}?since=1970-01-01T00:00:00%2B14:00&until=8999-01-01T00:00:00Z")


async def test_filters_that_exclude_each_other_are_refused_and_not_overruled() -> None:
    async with running_api() as api:
        other = await api.make("/teams", {"slug": "other"})
        status, message = await refused(api, "GET", f"/usage?project_id=default&team_id={other['id']}")
        assert (status, message.startswith("team_id: does not go with the others")) == (400, True)


async def test_two_resets_within_a_second_begin_two_periods() -> None:
    async with running_api() as api:
        standing_clock(api)
        budget = await api.make("/budgets", {"scope": "project", "window": "total", "limit_usd": "1"})
        one = f"/budgets/{budget['id']}"
        starts = []
        for _ in range(2):
            assert (await api.ask("POST", f"{one}/reset", {})).status == 200
            starts.append((await api.get(f"{one}/spend"))["period_start"])
        assert starts[0] < starts[1]
        assert (await refused(api, "POST", f"{one}/reset", {}))[0] == 409


# --- around it ------------------------------------------------------------------------------------------------


def test_what_libraries_log_is_a_line_of_the_gateways_log() -> None:
    stream = io.StringIO()
    with taking_library_records(Log("json", stream)):
        logging.getLogger("penstock.store").error("key %s cannot be used", "vk_1")
        try:
            int("prompt".upper())
        except ValueError:
            logging.getLogger("penstock.store").exception("a watcher failed")
    logging.getLogger("penstock.store").error("after it")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["level"], first["event"], first["logger"]) == ("error", "key vk_1 cannot be used", "penstock.store")
    assert "ValueError" in second["traceback"]
    assert "PROMPT" not in stream.getvalue()


@pytest.mark.parametrize(
    ("url", "openly"),
    [
        ("http://127.0.0.1:8080", False), ("http://[::1]:8080", False), ("https://gateway.example", False),
        ("http://gateway.example", True), ("http://localhost.example", True), ("http://example/127.0.0.1", True),
    ],
)  # fmt: skip
def test_login_warns_of_every_address_to_which_a_token_goes_in_the_open(url: str, *, openly: bool) -> None:
    assert sends_openly(url) is openly


def test_a_refused_token_is_told_by_where_it_came_from(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("ps_at_file")
    given = {"PENSTOCK_URL": "http://127.0.0.1:9", "PENSTOCK_TOKEN": "ps_at_variable"}
    assert find_access(environment=given).token_origin == "PENSTOCK_TOKEN"
    assert find_access(environment=given, token_file=str(token_file)).token_origin == "--token-file"
    home = {"XDG_CONFIG_HOME": str(tmp_path)}
    write_profile("http://127.0.0.1:9", "ps_at_kept", home)
    assert find_access(environment=home).token_origin is None
    assert find_access(environment={**home, "PENSTOCK_TOKEN": "ps_at_variable"}).token_origin == "PENSTOCK_TOKEN"


def test_an_argument_that_is_no_text_is_a_fault_of_usage() -> None:
    api = Client(Access("http://127.0.0.1:9", "ps_at_x", "--url"))
    with pytest.raises(ConfigurationError, match="no UTF-8"):
        api.request("POST", "/teams", {"slug": "\udcff"})


def test_an_output_that_takes_no_more_is_one_line_and_status_1() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [PENSTOCK, "new-key"], check=False, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, "penstock: standard output: No space left on device\n")


def test_a_reader_that_is_gone_ends_a_command_without_a_word() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [PENSTOCK, "new-key"], check=False, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_help_looks_for_installed_commands_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    found = importlib.metadata.entry_points

    def entry_points(**given: Any) -> Any:
        asked.append(given)
        return found(**given)

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    context = cli.make_context("penstock", [], resilient_parsing=True)
    names = cli.list_commands(context)
    assert {"demo", "store"} <= set(names)
    assert cli.get_command(context, "store") is not None
    assert cli.get_command(context, "demo") is not None
    assert asked == [{"group": COMMAND_GROUP}]


def test_two_demos_that_start_in_one_folder_have_one_key(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        ready = threading.Barrier(4)
        found: list[str] = []

        def start(folder: Path = folder, ready: threading.Barrier = ready, found: list[str] = found) -> None:
            ready.wait()
            found.append(prepare(folder, is_kept=True).virtual_key)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert set(found) == {(folder / "virtual-key").read_text().strip()}
