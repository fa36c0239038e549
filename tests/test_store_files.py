"""Keys beside the database, what a fresh store begins with, and what a start refuses, in one line each."""

from __future__ import annotations

import multiprocessing
import stat
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import func, select

from penstock import ConfigurationError
from penstock.governance import LocalAdmin, ObjectStore, Scope, Vault, is_token
from penstock_plugins.store.database import Database
from penstock_plugins.store.tables import objects
from store_fixtures import bindings_of, insert_binding, objects_of, owners_of, services_of, store_harness, vault_of


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for vendor in ("OPENAI", "ANTHROPIC"):
        for name in ("API_KEY", "BASE_URL"):
            monkeypatch.delenv(f"{vendor}_{name}", raising=False)


def start(folder: Path, *plugins: str, **store: Any) -> dict[str, Any]:
    """Start and stop a gateway; returns what of its store a test looks at."""

    async def main() -> dict[str, Any]:
        async with store_harness(folder, *plugins, **store) as harness:
            services = services_of(harness)
            kept = await objects_of(services).read(
                lambda reading: {
                    kind: list(reading.list(kind)) for kind in ("organization", "provider_binding", "api_token")
                }
            )
            local = services.get(LocalAdmin)  # type: ignore[type-abstract]
            pepper = vault_of(services).pepper
            bindings = list(bindings_of(services).all_bindings())
            return {**kept, "token": local.admin_token, "pepper": pepper, "bindings": bindings}

    return anyio.run(main)


def fault_of(folder: Path, **store: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        start(folder, **store)
    (fault,) = caught.value.faults
    assert fault.startswith("harness: [plugins.store] ")
    return fault


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir() if path.is_file()}


def test_fresh_store_has_one_of_each_and_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1234567890")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    first = start(tmp_path)
    (organization,), (binding,), (token,) = first["organization"], first["provider_binding"], first["api_token"]
    assert organization.id.startswith("org_")
    assert (binding.document["name"], binding.document["credential_last4"]) == ("openai", "7890")
    assert "sk-1234567890" not in str(binding.document)
    assert (first["bindings"][0].credential.reveal(), first["bindings"][0].base_url) == (
        "sk-1234567890", "http://127.0.0.1:9/v1",
    )  # fmt: skip
    assert is_token(first["token"].encode())
    assert (token.document["role"], token.document["scope_id"]) == ("org_admin", "*")
    assert first["token"] not in str(token.document)
    assert modes(tmp_path) == {0o600}


def test_second_start_finds_what_the_first_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1234567890")
    assert start(tmp_path) == first
    assert first["provider_binding"] == []


def test_binding_is_made_only_for_an_enabled_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant")
    assert start(tmp_path, "store", "virtual_keys", "routing", "openai")["provider_binding"] == []


@pytest.mark.parametrize("ending", ["key", "pepper"])
def test_start_without_its_keys_is_refused(tmp_path: Path, ending: str) -> None:
    first = start(tmp_path)
    path = tmp_path / f"penstock.db.{ending}"
    kept = path.read_text()
    path.unlink()
    assert "is missing, and the database was made with it" in fault_of(tmp_path)
    assert not path.exists()
    path.write_text(kept)
    path.chmod(0o640)
    assert "is open to others (mode 0640)" in fault_of(tmp_path)
    path.chmod(0o600)
    path.write_text("")
    assert "is empty" in fault_of(tmp_path)
    path.write_text("0" * 64)
    assert "does not fit this database" in fault_of(tmp_path)
    path.write_text(kept)
    assert start(tmp_path) == first


def test_keys_of_the_configuration_make_no_files(tmp_path: Path) -> None:
    given = {"encryption_key": "ab" * 32, "pepper": "a pepper of sixteen"}
    assert start(tmp_path, **given)["pepper"] == b"a pepper of sixteen"
    assert not list(tmp_path.glob("*.key")) + list(tmp_path.glob("*.pepper"))
    assert "encryption_key: does not fit this database" in fault_of(tmp_path, **{**given, "encryption_key": "cd" * 32})
    assert "pepper: does not fit this database" in fault_of(tmp_path, **{**given, "pepper": "another pepper of it"})
    assert "pepper: must be at least 16 characters" in fault_of(tmp_path, **{**given, "pepper": "short"})
    assert "encryption_key: must be 32 bytes in hex or base64" in fault_of(tmp_path, **{**given, "encryption_key": "x"})


@pytest.mark.parametrize(
    "url", ["postgresql://host/db", "sqlite://", "sqlite:///", "sqlite:///:memory:", "penstock.db"]
)
def test_url_that_is_no_file_is_refused(tmp_path: Path, url: str) -> None:
    assert "url: must be sqlite:///PATH" in fault_of(tmp_path, url=url)


def test_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "penstock.db").write_bytes(b"x" * 4096)
    assert "file is not a database" in fault_of(tmp_path)


def test_store_named_after_who_needs_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match='name "store" first'):
        start(tmp_path, "virtual_keys", "routing", "openai", "store")


def test_token_file_open_to_others_is_not_handed_out(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / "penstock.db.admin-token").chmod(0o644)
    assert start(tmp_path)["token"] is None


def _start_at_once(folder: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    found = start(folder)
    results.put((found["token"], found["organization"][0].id, found["pepper"]))


def test_processes_that_start_at_once_make_one_store(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(3), spawn.Queue()
    processes = [spawn.Process(target=_start_at_once, args=(tmp_path, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert found[0] == found[1] == found[2]
    database = Database(f"sqlite:///{tmp_path}/penstock.db")
    with database.writer.begin() as connection:
        count = select(func.count()).select_from(objects).where(objects.c.kind == "organization")
        assert connection.execute(count).scalar_one() == 1
    database.close()


def test_reload_keeps_the_store_open_and_drops_old_watchers(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_harness(tmp_path) as harness:
            before = services_of(harness)
            store = objects_of(before)
            calls: list[str] = []
            store.watch(lambda: calls.append("old"))
            old_generation = harness.gateway.generation
            await harness.gateway.reload(harness.configuration)
            await old_generation._ended.wait()
            after = services_of(harness)
            after.get(ObjectStore).watch(lambda: calls.append("new"))  # type: ignore[type-abstract]
            assert after.get(Vault).pepper == vault_of(before).pepper  # type: ignore[type-abstract]
            owners = await owners_of(objects_of(after))
            await insert_binding(after, Scope(owners.organization.id), owners.organization.id, "a")
            assert calls == ["new"]
            assert [binding.name for binding in bindings_of(after).all_bindings()] == ["a"]

    anyio.run(main)
