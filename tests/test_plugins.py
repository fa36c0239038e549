"""How plugins are found, built and registered, and what is refused with one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest

from penstock import ConfigurationError, ProviderBinding, Services
from penstock import plugins as loader
from penstock.config import read_document
from penstock.hooks import compile_hooks

HEAD = """
from __future__ import annotations
from typing import Literal
import attrs
from penstock import hookimpl, Secret, Services

"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("penstock_file_")]:
        del sys.modules[name]


def load(folder: Path, *entries: str, tables: dict[str, Any] | None = None) -> tuple[Any, tuple[loader.Plugin, ...]]:
    document = {"gateway": {"plugins": list(entries)}, "plugins": tables or {}}
    configuration = read_document(document, source="f.toml", folder=folder, environment={})
    return loader.load(configuration, Services())


def faults_of(folder: Path, *entries: str, tables: dict[str, Any] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        load(folder, *entries, tables=tables)
    return caught.value.faults


def write(folder: Path, name: str, body: str) -> str:
    (folder / name).write_text(HEAD + body)
    return f"./{name}"


def write_hook(folder: Path, hook: str, name: str = "mine.py") -> str:
    lines = "".join(f"    {line}\n" for line in hook.splitlines())
    return write(folder, name, f"class Mine:\n{lines}")


# --- finding ------------------------------------------------------------------------------------------------


def test_bundled_plugins_are_entry_points_like_any_others() -> None:
    bundled = {point.name for point in entry_points(group="penstock") if point.value.startswith("penstock_plugins")}
    assert {"virtual_keys", "routing", "openai", "anthropic", "openai_compatible", "mock"} <= bundled
    assert bundled <= set(loader.installed())


def test_installed_is_not_enabled(folder: Path) -> None:
    _, plugins = load(folder, "openai")
    assert [plugin.name for plugin in plugins] == ["openai"]


def test_unknown_plugin_suggests_the_nearest_installed(folder: Path) -> None:
    (fault,) = faults_of(folder, "virtual_key")
    assert fault == ("f.toml: [gateway] plugins: no plugin 'virtual_key' is installed; did you mean \"virtual_keys\"?")


def test_unknown_plugin_lists_what_is_installed_where_nothing_is_near(folder: Path) -> None:
    (fault,) = faults_of(folder, "zzzzzz")
    assert "installed: anthropic, " in fault


def test_every_faulty_plugin_is_reported_at_once(folder: Path) -> None:
    write(folder, "empty.py", "")
    assert len(faults_of(folder, "nope_one", "./none.py", "./empty.py")) == 3


def test_plugin_in_a_file_beside_the_configuration(folder: Path) -> None:
    entry = write_hook(folder, "@hookimpl\ndef pre_request(self, exchange): ...")
    manager, (plugin,) = load(folder, entry)
    assert (plugin.name, plugin.hooks, plugin.distribution) == ("mine", ("pre_request",), "./mine.py")
    assert [call.plugin for call in compile_hooks(manager).pre_request] == ["mine"]


def test_class_is_chosen_by_name(folder: Path) -> None:
    body = "".join(f"class {name}:\n    @hookimpl\n    def lifespan(self): ...\n" for name in ("One", "Two"))
    entry = write(folder, "mine.py", body)
    (fault,) = faults_of(folder, entry)
    assert "found One, Two; name one as ./mine.py:ClassName" in fault
    _, (plugin,) = load(folder, f"{entry}:Two")
    assert type(plugin.instance).__name__ == "Two"


@pytest.mark.parametrize(
    ("entry", "body", "fault"),
    [
        ("./none.py", None, "there is no file ./none.py"),
        ("./mine.py:Three", "class Mine:\n    @hookimpl\n    def lifespan(self): ...", "found none"),
        ("./mine.py", "class Mine: ...", "found none"),
        ("./mine.py", "import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("./mine.py", "class :", "SyntaxError"),
        ("./mine.py", "1 / 0", "ZeroDivisionError"),
    ],
)
def test_file_without_a_usable_plugin_is_one_line(folder: Path, entry: str, body: str | None, fault: str) -> None:
    if body is not None:
        write(folder, "mine.py", body)
    (found,) = faults_of(folder, entry)
    assert found.startswith("f.toml: [gateway] plugins: ")
    assert fault in found


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("no_such_module:Plugin", "cannot be imported: ModuleNotFoundError"),
        ("penstock:NoSuchName", "cannot be imported: AttributeError"),
        ("penstock:__version__", "is no class with @hookimpl methods"),
        ("penstock:Secret", "is no class with @hookimpl methods"),
    ],
)
def test_broken_entry_point_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, value: str, fault: str) -> None:
    point = EntryPoint("broken", value, "penstock")
    monkeypatch.setattr(loader, "installed", lambda: {"broken": point})
    (found,) = faults_of(folder, "broken")
    assert fault in found


def test_config_class_of_a_file_may_use_annotations_as_strings(folder: Path) -> None:
    entry = write(
        folder,
        "mine.py",
        "@attrs.define(eq=False)\nclass Mine:\n"
        "    @attrs.frozen\n    class Config:\n        token: Secret\n        mode: Literal['a', 'b'] = 'a'\n"
        "    config: Config\n    services: Services\n"
        "    @hookimpl\n    def lifespan(self): ...\n",
    )
    _, (plugin,) = load(folder, entry, tables={"mine": {"token": "t", "mode": "b"}})
    assert (plugin.instance.config.token.reveal(), plugin.instance.config.mode) == ("t", "b")


@pytest.mark.parametrize(
    "entries",
    [
        ["openai", "openai"],
        ["./mine.py", "./mine.py"],
        ["./mine.py", "./deep/mine.py"],
        ["./mine.py:Mine", "./mine.py"],
    ],
)
def test_same_name_twice_is_refused(folder: Path, entries: list[str]) -> None:
    (folder / "deep").mkdir()
    for name in ("mine.py", "deep/mine.py"):
        write_hook(folder, "@hookimpl\ndef pre_request(self, exchange): ...", name)
    (fault,) = faults_of(folder, *entries)
    assert fault.endswith("is named twice")


# --- hooks that would never run as meant ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "fault"),
    [
        (
            "@hookimpl\ndef pre_requests(self, exchange): ...",
            'pre_requests is no hook; did you mean "pre_request"?',
        ),
        ("@hookimpl\ndef zzz(self): ...", "zzz is no hook; hooks are register_providers, "),
        ("@hookimpl\ndef pre_request(self): ...", "must take (self, exchange), takes (self)"),
        (
            "@hookimpl\ndef pre_request(self, request): ...",
            "must take (self, exchange), takes (self, request)",
        ),
        ("@hookimpl\ndef on_stream_chunk(self, exchange): ...", "must take (self, exchange, chunk)"),
        ("@hookimpl\ndef lifespan(self, app): ...", "must take (self), takes (self, app)"),
        (
            "@hookimpl(wrapper=True)\ndef pre_request(self, exchange):\n    return (yield)",
            "cannot be a hook wrapper",
        ),
        ("@hookimpl(hookwrapper=True)\ndef lifespan(self):\n    yield", "cannot be a hook wrapper"),
        ("@hookimpl\nasync def register_providers(self): ...", "cannot be async def"),
        ("@hookimpl\nasync def lifespan(self):\n    yield", "with @asynccontextmanager under @hookimpl"),
        ("@hookimpl\ndef pre_request(self, exchange):\n    yield", "is a generator function"),
    ],
)
def test_hook_that_would_never_run_as_meant_is_refused(folder: Path, hook: str, fault: str) -> None:
    (found,) = faults_of(folder, write_hook(folder, hook))
    assert found.startswith("f.toml: plugin 'mine': ")
    assert fault in found


@pytest.mark.parametrize(
    "hook",
    [
        "@hookimpl\nasync def pre_request(self, exchange): ...",
        "@staticmethod\n@hookimpl\ndef pre_request(exchange): ...",
    ],
)
def test_hooks_may_be_async_or_static(folder: Path, hook: str) -> None:
    manager, _ = load(folder, write_hook(folder, hook))
    assert len(compile_hooks(manager).pre_request) == 1


# --- order and building -------------------------------------------------------------------------------------


def test_hooks_run_in_the_order_of_the_configuration_and_settle_in_reverse(folder: Path) -> None:
    hooks = "@hookimpl\ndef pre_request(self, exchange): ...\n@hookimpl\ndef post_response(self, exchange): ..."
    entries = [write_hook(folder, hooks, f"{name}.py") for name in ("b", "a", "c")]
    manager, _ = load(folder, *entries)
    compiled = compile_hooks(manager)
    assert [call.plugin for call in compiled.pre_request] == ["b", "a", "c"]
    assert [call.plugin for call in compiled.post_response] == ["c", "a", "b"]


def test_settings_of_a_plugin_without_any_are_refused(folder: Path) -> None:
    entry = write_hook(folder, "@hookimpl\ndef lifespan(self): ...")
    assert faults_of(folder, entry, tables={"mine": {"a": 1}}) == (
        "f.toml: [plugins.mine] a: this plugin has no settings",
    )


def test_unknown_setting_suggests_the_known_one(folder: Path) -> None:
    (fault,) = faults_of(folder, "routing", tables={"routing": {"binding": []}})
    assert fault == 'f.toml: [plugins.routing] binding: unknown key; did you mean "bindings"?'


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        ("ValueError('too small')", "[plugins.mine] too small"),
        ("KeyError('x')", "[plugins.mine] cannot be built: KeyError: 'x'"),
        ("OSError('no')", "[plugins.mine] cannot be built: OSError: no"),
    ],
)
def test_constructor_that_raises_is_one_line(folder: Path, error: str, fault: str) -> None:
    entry = write_hook(
        folder, f"def __init__(self):\n    raise {error}\n@hookimpl\ndef pre_request(self, exchange): ..."
    )
    assert faults_of(folder, entry) == (f"f.toml: {fault}",)


def test_config_that_is_no_attrs_class_is_refused(folder: Path) -> None:
    hook = "class Config:\n    a: int = 1\ndef __init__(self, config): ...\n@hookimpl\ndef lifespan(self): ..."
    (fault,) = faults_of(folder, write_hook(folder, hook))
    assert fault.endswith("Mine.Config must be an attrs class")


@pytest.mark.parametrize(
    ("hook", "fault"),
    [
        ("@attrs.frozen\nclass Config:\n    a: int = 1", "Mine has a class Config and nowhere to put it: add the"),
        (
            "def __init__(self, clock): ...",
            "Mine takes clock, which nobody gives it; a plugin may ask for config",
        ),
        ("def __init__(self, name, /, a, b=1, *c, d): ...", "Mine takes a, d, which nobody gives it"),
        ("def __init__(self, config): ...", "Mine takes config and has no class Config"),
    ],
)
def test_constructor_that_cannot_be_called_is_told_what_there_is(folder: Path, hook: str, fault: str) -> None:
    (found,) = faults_of(folder, write_hook(folder, f"{hook}\n@hookimpl\ndef pre_request(self, exchange): ..."))
    assert found.startswith(f"f.toml: [plugins.mine]: {fault}")


def test_constructor_may_take_whatever_comes(folder: Path) -> None:
    hook = "@attrs.frozen\nclass Config: ...\ndef __init__(self, **given):\n    self.given = given"
    hook += "\n@hookimpl\ndef pre_request(self, exchange): ..."
    _, (plugin,) = load(folder, write_hook(folder, hook))
    assert list(plugin.instance.given) == ["config"]


@pytest.mark.parametrize("name", ["see_chunks", "edit_chunks", "edits_bodies", "read_body"])
def test_misspelt_need_is_refused(folder: Path, name: str) -> None:
    hook = f"{name} = True\n@hookimpl\ndef on_stream_chunk(self, exchange, chunk): ..."
    (fault,) = faults_of(folder, write_hook(folder, hook))
    assert fault.startswith(f"f.toml: plugin 'mine': {name} is no declared need; did you mean ")


def test_declared_needs_are_reported(folder: Path) -> None:
    hook = "sees_chunks = True\nedits_chunks = True\n@hookimpl\ndef on_stream_chunk(self, exchange, chunk): ..."
    _, (plugin,) = load(folder, write_hook(folder, hook))
    assert plugin.needs == ("sees_chunks", "edits_chunks")


@pytest.mark.parametrize("decorator", ["@attrs.define(eq=False)", "@attrs.define(slots=False)", "@attrs.frozen"])
@pytest.mark.parametrize("need", loader.NEEDS)
def test_annotated_need_is_refused_with_the_way_out(folder: Path, decorator: str, need: str) -> None:
    hook = "    @hookimpl\n    def on_stream_chunk(self, exchange, chunk): ..."
    entry = write(folder, "mine.py", f"{decorator}\nclass Mine:\n    {need}: bool = True\n{hook}\n")
    (fault,) = faults_of(folder, entry)
    assert fault == (
        f"f.toml: plugin 'mine': {need} has an annotation, so @attrs.define takes it for an argument of the "
        f"constructor; drop the annotation: {need} = True"
    )


def test_misspelt_need_with_an_annotation_is_refused(folder: Path) -> None:
    hook = "    @hookimpl\n    def on_stream_chunk(self, exchange, chunk): ..."
    entry = write(folder, "mine.py", f"@attrs.define\nclass Mine:\n    see_chunks: bool = True\n{hook}\n")
    (fault,) = faults_of(folder, entry)
    assert "see_chunks is no declared need; did you mean" in fault


@pytest.mark.parametrize("line", ["sees_chunks: ClassVar[bool] = True", "sees_chunks = True"])
def test_need_of_the_class_is_no_argument(folder: Path, line: str) -> None:
    hook = "    @hookimpl\n    def on_stream_chunk(self, exchange, chunk): ..."
    body = f"from typing import ClassVar\n@attrs.define\nclass Mine:\n    {line}\n{hook}\n"
    _, (plugin,) = load(folder, write(folder, "mine.py", body))
    assert plugin.needs == ("sees_chunks",)


# --- provider types -----------------------------------------------------------------------------------------


def binding(kind: str) -> ProviderBinding:
    return ProviderBinding("gpc_b", "b", kind, "")


def test_provider_type_of_an_installed_plugin_suggests_to_enable_it() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Services().provider_of(binding("mock"))
    assert str(caught.value) == (
        "binding 'b': no enabled plugin brings provider type 'mock'; enabled: none; "
        'an installed plugin is called "mock": add it to [gateway] plugins'
    )


def test_provider_type_nobody_knows_suggests_nothing() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Services().provider_of(binding("mocc"))
    assert str(caught.value) == "binding 'b': no enabled plugin brings provider type 'mocc'; enabled: none"
