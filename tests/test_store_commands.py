"""``penstock store``: backup, restore, key rotation, and what they refuse."""

from __future__ import annotations

import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import attrs
import msgspec
import pytest
from click.testing import CliRunner, Result

from penstock import ConfigurationError
from penstock.governance import Intent, LedgerEntry, is_token
from penstock_plugins.store.commands import store
from penstock_plugins.store.files import Place
from penstock_plugins.store.journal import Journal
from store_fixtures import (
    archive,
    bindings_of,
    change,
    insert_binding,
    objects_of,
    owners_of,
    services_of,
    store_harness,
    vault_of,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a configuration, and a store that holds a binding called ``one``."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "penstock.toml").write_text('[gateway]\nplugins = ["store", "virtual_keys"]\n')
    add_binding(tmp_path, "one")
    return tmp_path


def add_binding(folder: Path, name: str) -> None:
    async def main() -> None:
        async with store_harness(folder) as harness:
            services = services_of(harness)
            owners = await owners_of(objects_of(services))
            await insert_binding(services, owners.organization.scope, owners.organization.id, name)

    anyio.run(main)


def credentials(folder: Path) -> list[str]:
    async def main() -> list[str]:
        async with store_harness(folder) as harness:
            found = bindings_of(services_of(harness)).all_bindings()
            return [binding.credential.reveal() for binding in found if binding.credential is not None]

    return anyio.run(main)


def run(folder: Path, command: str, *arguments: str) -> Result:
    return CliRunner().invoke(store, [command, *arguments, "--config", str(folder / "penstock.toml")])


def test_backup_holds_what_a_running_gateway_has_committed(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = tmp_path_factory.mktemp("elsewhere") / "b.db"

    async def main() -> None:
        async with store_harness(folder) as harness:
            services = services_of(harness)
            owners = await owners_of(objects_of(services))
            await insert_binding(services, owners.organization.scope, owners.organization.id, "two")
            finished = await anyio.to_thread.run_sync(run, folder, "backup", str(copy))
            assert finished.exit_code == 0, finished.output

    anyio.run(main)
    assert [path.name for path in copy.parent.iterdir()] == ["b.db"]
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    add_binding(folder, "three")
    finished = run(folder, "restore", str(copy), "--yes")
    assert finished.exit_code == 0, finished.output
    assert sorted(credentials(folder)) == ["sk-one", "sk-two"]


@pytest.mark.parametrize("is_alive", [True, False])
def test_backup_holds_what_is_only_in_a_journal_yet(folder: Path, is_alive: bool) -> None:
    entry, intent = ledger_entry("req_settled"), open_intent("req_open")
    journal = Journal(Place(folder / "penstock.db").journal, "a_process")
    journal.add_intent(intent.request_id, msgspec.msgpack.encode(intent))
    journal.add_entry(entry.request_id, msgspec.msgpack.encode(entry))
    if not is_alive:
        os.close(journal._lock)
    copy = folder / "b.db"
    finished = run(folder, "backup", str(copy))
    assert finished.exit_code == 0, finished.output
    expected = {("req_settled", "success", 7)} | (set() if is_alive else {("req_open", "interrupted", 5)})
    with closing(sqlite3.connect(copy)) as connection:
        rows = connection.execute("SELECT request_id, outcome, cost_nano_usd FROM ledger").fetchall()
        assert set(rows) == expected
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    if is_alive:
        os.close(journal._lock)
    for segment in journal._segments:
        os.close(segment.descriptor)


_SCOPES: dict[str, Any] = {
    "organization_id": "org_1", "team_id": "team_1", "project_id": "proj_1", "virtual_key_id": "vk_1",
    "principal_id": "user_1", "end_user": None, "provider": "mock", "model_asked": "m", "model_served": "m",
}  # fmt: skip


def open_intent(request_id: str) -> Intent:
    return Intent(
        request_id=request_id, started_at_ns=1_700_000_000 * 10**9, binding_id="gpc_1", estimate_nano_usd=5, **_SCOPES
    )


def ledger_entry(request_id: str) -> LedgerEntry:
    return LedgerEntry(
        request_id=request_id, started_at_ns=1_700_000_000 * 10**9, duration_ns=1, binding_id="gpc_1", usage=None,
        cost_nano_usd=7, cost_source="priced", price_version=None, status=200, outcome="success", error=None,
        is_stream=False, fallback_count=0, **_SCOPES,
    )  # fmt: skip


def test_backup_with_keys_makes_a_store_in_an_empty_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "penstock.toml").write_text('[gateway]\nplugins = ["store", "virtual_keys"]\n')
    copy = other / "b.db"
    assert run(folder, "backup", str(copy), "--with-keys").exit_code == 0
    assert {stat.S_IMODE(path.stat().st_mode) for path in other.glob("b.db*")} == {0o600}
    assert run(other, "restore", str(copy)).exit_code == 0
    assert credentials(other) == ["sk-one"]


def test_backup_replaces_no_file(folder: Path) -> None:
    (folder / "b.db").write_text("mine")
    finished = run(folder, "backup", str(folder / "b.db"))
    assert (finished.exit_code, (folder / "b.db").read_text()) == (1, "mine")
    assert "is there already" in finished.output


def test_restore_refuses_what_would_destroy(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = folder / "b.db"
    assert run(folder, "backup", str(copy)).exit_code == 0
    before = (folder / "penstock.db").read_bytes()

    def refused(reason: str, file: Path, *options: str) -> None:
        finished = run(folder, "restore", str(file), *options)
        assert (finished.exit_code, reason in finished.output) == (1, True), finished.output
        assert (folder / "penstock.db").read_bytes() == before

    refused("say --yes", copy)
    refused("there is no file", folder / "nothing.db", "--yes")
    (folder / "text.db").write_text("no database")
    refused("is no backup of a store", folder / "text.db", "--yes")
    (folder / "cut.db").write_bytes(copy.read_bytes()[:-20_000])
    refused("", folder / "cut.db", "--yes")
    stranger = tmp_path_factory.mktemp("stranger")
    (stranger / "penstock.toml").write_text('[gateway]\nplugins = ["store", "virtual_keys"]\n')
    add_binding(stranger, "theirs")
    assert run(stranger, "backup", str(folder / "theirs.db")).exit_code == 0
    refused("does not fit", folder / "theirs.db", "--yes")


def test_restore_refuses_while_a_gateway_has_it_open(folder: Path) -> None:
    copy = folder / "b.db"
    assert run(folder, "backup", str(copy)).exit_code == 0

    async def main() -> None:
        async with store_harness(folder):
            finished = await anyio.to_thread.run_sync(run, folder, "restore", str(copy), "--yes")
            assert finished.exit_code == 1
            assert "a gateway has" in finished.output

    anyio.run(main)
    with Place(folder / "penstock.db").alone() as is_alone:
        assert is_alone
        with pytest.raises(ConfigurationError, match="is just being restored"):
            credentials(folder)


def test_restore_refuses_a_newer_schema(folder: Path) -> None:
    copy = folder / "b.db"
    assert run(folder, "backup", str(copy)).exit_code == 0
    with closing(sqlite3.connect(copy)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    finished = run(folder, "restore", str(copy), "--yes")
    assert isinstance(finished.exception, ConfigurationError)
    assert "has schema 9999" in str(finished.exception)
    assert credentials(folder) == ["sk-one"]


def test_restore_drops_a_token_the_restored_store_does_not_know(folder: Path) -> None:
    copy = folder / "b.db"
    assert run(folder, "backup", str(copy)).exit_code == 0
    token = folder / "penstock.db.admin-token"
    first = token.read_text()
    assert run(folder, "restore", str(copy), "--yes").exit_code == 0
    assert token.read_text() == first
    finished = run(folder, "admin-token")
    assert is_token(finished.output.strip().encode())
    assert token.read_text() == finished.output != first
    assert run(folder, "restore", str(copy), "--yes").exit_code == 0
    assert not token.exists()


def test_rotation_seals_all_anew_under_a_running_gateway(folder: Path) -> None:
    ring = folder / "penstock.db.key"
    first = ring.read_text().split()

    async def main() -> None:
        async with store_harness(folder) as harness:
            services = services_of(harness)
            objects, owners = objects_of(services), await owners_of(objects_of(services))
            gone = await insert_binding(services, owners.organization.scope, owners.organization.id, "gone")
            await archive(objects, gone)
            finished = await anyio.to_thread.run_sync(run, folder, "rotate-key")
            assert (finished.exit_code, "1 secrets" in finished.output) == (0, True), finished.output
            (stored,) = await objects.read(lambda reading: reading.list("provider_binding"))
            opened = vault_of(services).open(stored.document["credential"], context=f"provider_binding:{stored.id}")
            assert opened == "sk-one"
            known = objects.revision
            await change(objects, stored, fallback_priority=1)
            assert objects.revision > known
            (binding,) = bindings_of(services).all_bindings()
            assert binding.credential is not None
            assert binding.credential.reveal() == "sk-one"

    anyio.run(main)
    second = ring.read_text().split()
    assert second[1:] == first
    assert credentials(folder) == ["sk-one"]
    assert run(folder, "rotate-key").exit_code == 0
    third = ring.read_text().split()
    assert third[1:] == second[:1]
    assert credentials(folder) == ["sk-one"]


def test_commands_name_a_missing_database(folder: Path) -> None:
    (folder / "penstock.db").unlink()
    for command in ("rotate-key", "admin-token"):
        assert "there is no database" in str(run(folder, command).exception)
    finished = run(folder, "backup", str(folder / "b.db"))
    assert (finished.exit_code, "there is no database" in finished.output) == (1, True)


def test_place_names_files_beside_the_database() -> None:
    place = Place(Path("/data/a.db"))
    assert [str(path) for path in (place.key, place.pepper, place.lock, place.journal)] == [
        "/data/a.db.key", "/data/a.db.pepper", "/data/a.db.lock", "/data/a.db.journal",
    ]  # fmt: skip
    assert attrs.has(Place)
