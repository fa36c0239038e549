"""The configuration file: what is refused, in which words, and that secrets never print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import cattrs
import pytest
from cattrs.errors import BaseValidationError
from hypothesis import given
from hypothesis import strategies as st

import penstock
from penstock import ConfigurationError, Secret
from penstock.config import Configuration, read_document, read_file
from penstock.structuring import describe, read_secret, structure
from penstock_plugins.routing import Routing
from penstock_plugins.virtual_keys import VirtualKeys

KeysConfig, RoutingConfig = VirtualKeys.Config, Routing.Config
SECRET = "sk-a-secret-that-never-prints"


def read(
    gateway: Any = None, plugins: Any = None, environment: Mapping[str, str] | None = None, **overrides: Any
) -> Configuration:
    document = {} if gateway is None else {"gateway": gateway}
    if plugins is not None:
        document["plugins"] = plugins
    return read_document(document, source="f.toml", environment=environment or {}, overrides=overrides)


def faults_of(*arguments: Any, **options: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        read(*arguments, **options)
    return caught.value.faults


def faults_in(table: Any, kind: type[Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        structure(table, kind, where="f.toml: [plugins.p]")
    return caught.value.faults


def test_empty_document_is_the_defaults() -> None:
    configuration = read()
    assert configuration.gateway.address == ("127.0.0.1", 8080)
    assert configuration.gateway.plugins == ()
    assert configuration.origins == {}


@pytest.mark.parametrize(
    ("gateway", "fault"),
    [
        (3, "f.toml: [gateway]: must be a table, not a whole number"),
        ({"listn": "x"}, 'f.toml: [gateway] listn: unknown key; did you mean "listen"?'),
        ({"zzz": 1}, "f.toml: [gateway] zzz: unknown key"),
        ({"workers": "2"}, "f.toml: [gateway] workers: must be a whole number, not a string"),
        ({"workers": True}, "f.toml: [gateway] workers: must be a whole number, not true or false"),
        ({"workers": 0}, "f.toml: [gateway] workers: must be from 1 to 256"),
        ({"anonymous": 1}, "f.toml: [gateway] anonymous: must be true or false, not a whole number"),
        ({"plugins": "a"}, "f.toml: [gateway] plugins: must be a list of strings, not a string"),
        ({"plugins": ["a", 1]}, "f.toml: [gateway] plugins: must be a list of strings, holds a whole number"),
        ({"limits": "x"}, "f.toml: [gateway] limits: must be a table, not a string"),
        ({"limits": {"head_timeout": 0}}, "f.toml: [gateway] limits.head_timeout: must be more than 0"),
        (
            {"limits": {"head_timeout": "1"}},
            "f.toml: [gateway] limits.head_timeout: must be a number, not a string",
        ),
        (
            {"limits": {"max_bodybytes": 1}},
            'f.toml: [gateway] limits.max_bodybytes: unknown key; did you mean "max_body_bytes"?',
        ),
        (
            {"upstream": {"idle_timeout": -1.5}},
            "f.toml: [gateway] upstream.idle_timeout: must be more than 0",
        ),
        ({"tls": {"certificate": "c.pem"}}, "f.toml: [gateway] tls.key: is missing"),
        (
            {"drain_after_disconnect": {"seconds": 1}},
            "f.toml: [gateway] drain_after_disconnect.bytes: is missing",
        ),
        (
            {"log": "jsn"},
            'f.toml: [gateway] log: must be one of "auto", "json", "console", "off"; did you mean "json"?',
        ),
        (
            {"spans": 1},
            'f.toml: [gateway] spans: must be one of "off", "console", "otlp", not a whole number',
        ),
        (
            {"namespace": "Our Gate"},
            "f.toml: [gateway] namespace: use lower-case letters, digits and _, a letter first, at most 32",
        ),
        ({"listen": "localhost"}, "f.toml: [gateway] listen: 'localhost' is not HOST:PORT"),
        ({"listen": "localhost:http"}, "f.toml: [gateway] listen: 'localhost:http' is not HOST:PORT"),
        ({"listen": "localhost:65536"}, "f.toml: [gateway] listen: 'localhost:65536' is not HOST:PORT"),
        ({"listen": "h:٣"}, "f.toml: [gateway] listen: 'h:٣' is not HOST:PORT"),
        (
            {"listen": "[::1:80"},
            "f.toml: [gateway] listen: '[::1:80' is not HOST:PORT; an IPv6 host is written in brackets",
        ),
        (
            {"listen": "::1:80"},
            "f.toml: [gateway] listen: '::1:80' is not HOST:PORT; an IPv6 host is written in brackets",
        ),
    ],
)
def test_fault_is_one_line_with_file_table_key_and_way_out(gateway: Any, fault: str) -> None:
    assert faults_of(gateway) == (fault,)


def test_every_fault_is_reported_at_once() -> None:
    assert len(faults_of({"listn": "x", "workers": "2", "limits": {"head_timeout": "1", "nope": 1}})) == 4


def test_unknown_top_level_table_suggests_the_known_one() -> None:
    with pytest.raises(ConfigurationError, match=r'f.toml: \[gatway\]: unknown table; did you mean "gateway"'):
        read_document({"gatway": {}}, source="f.toml")


@pytest.mark.parametrize("plugins", [3, {"routing": 3}, []])
def test_plugin_settings_must_be_tables(plugins: Any) -> None:
    assert faults_of({}, plugins) == ("f.toml: [plugins]: each plugin's settings are a table of their own",)


def test_table_of_a_plugin_that_is_not_enabled_is_refused() -> None:
    (fault,) = faults_of({"plugins": ["routing"]}, {"rooting": {}})
    assert fault.startswith("f.toml: [plugins.rooting]: the plugin is not in [gateway] plugins")
    assert fault.endswith('did you mean "routing"?')


@pytest.mark.parametrize("entry", ["./audit.py", "./audit.py:Audit", "folder/audit.py"])
def test_table_of_a_file_plugin_has_the_files_name(entry: str) -> None:
    assert read({"plugins": [entry]}, {"audit": {"a": 1}}).plugin_table("audit") == {"a": 1}


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("[::1]:80", ("::1", 80)),
        (":0", ("0.0.0.0", 0)),
        ("gateway.internal:8080", ("gateway.internal", 8080)),
    ],
)
def test_listen_is_host_and_port(listen: str, address: tuple[str, int]) -> None:
    assert read({"listen": listen}).gateway.address == address


@given(st.text(max_size=30))
def test_any_listen_is_an_address_or_a_fault(listen: str) -> None:
    faults: tuple[str, ...] = ()
    try:
        assert 0 <= read({"listen": listen}).gateway.address[1] <= 65535
    except ConfigurationError as error:
        faults = error.faults
    assert all(fault.startswith("f.toml: [gateway] listen: ") for fault in faults)


# --- precedence ---------------------------------------------------------------------------------------------


def test_command_line_wins_over_environment_over_file_over_default() -> None:
    file = {"listen": "a:1", "log": "json", "spans": "console"}
    environment = {"PENSTOCK_LISTEN": "b:2", "PENSTOCK_LOG": "off"}
    configuration = read(file, None, environment, listen="c:3")
    gateway = configuration.gateway
    assert (gateway.listen, gateway.log, gateway.spans, gateway.workers) == ("c:3", "off", "console", 1)
    assert configuration.origins == {"listen": "command line", "log": "environment", "spans": "file"}


@pytest.mark.parametrize(
    ("variable", "value", "fault"),
    [
        ("PENSTOCK_WORKERS", "two", "environment: PENSTOCK_WORKERS: 'two' is not a number"),
        ("PENSTOCK_WORKERS", "0", "environment: PENSTOCK_WORKERS: must be from 1 to 256"),
        ("PENSTOCK_LISTEN", "x", "environment: PENSTOCK_LISTEN: 'x' is not HOST:PORT"),
    ],
)
def test_fault_of_a_variable_names_the_variable(variable: str, value: str, fault: str) -> None:
    assert faults_of({}, None, {variable: value}) == (fault,)


def test_wrong_choice_in_a_variable_names_the_variable() -> None:
    (fault,) = faults_of({"log": "json"}, None, {"PENSTOCK_LOG": "xml"})
    assert fault.startswith("environment: PENSTOCK_LOG: ")


def test_fault_of_the_command_line_names_the_option() -> None:
    assert faults_of({}, None, {}, listen="x") == ("command line: --listen: 'x' is not HOST:PORT",)


# --- files --------------------------------------------------------------------------------------------------


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_file(tmp_path / "none.toml")
    assert str(caught.value) == f"{tmp_path}/none.toml: cannot be read: No such file or directory"


@pytest.mark.parametrize("content", [b"[gateway", b"\xff\xfe", b"a = 1\na = 2"])
def test_broken_toml_is_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "f.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        read_file(file)
    assert str(caught.value).startswith(f"{file}: is not valid TOML: ")
    assert "\n" not in str(caught.value)


# --- what plugins' settings may be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ({"pepper": "p", "keys": SECRET}, "keys: must be a list, not a string"),
        ({"pepper": "p", "keys": [SECRET]}, "keys[0]: must be a table, not a string"),
        ({"pepper": "p", "keys": [{"name": "a", "model_aliases": SECRET}]},
         "keys[0].model_aliases: must be a table, not a string"),
        ({"pepper": "p", "keys": [{"name": "a", "metadata": {"x": 1}}]},
         "keys[0].metadata.x: must be a string, not a whole number"),
        ({"pepper": "p", "keys": [{}]}, "keys[0].name: is missing"),
        ({"pepper": "p", "keys": [{"name": "a"}, {"name": "b", "secrets": SECRET}]},
         'keys[1].secrets: unknown key; did you mean "secret"?'),
        ({"pepper": ""}, "pepper: is empty"),
        ({"pepper": {"env": "PENSTOCK_NO_SUCH_VARIABLE"}},
         "pepper: the environment variable PENSTOCK_NO_SUCH_VARIABLE is not set"),
        ({"pepper": {"env": "A", "file": "B"}},
         'pepper: must be a string, { env = "NAME" } or { file = "path" }'),
        ({"pepper": 12345}, 'pepper: must be a string, { env = "NAME" } or { file = "path" }'),
    ],
)  # fmt: skip
def test_fault_in_a_plugins_table_names_the_place_and_no_value(table: Any, fault: str) -> None:
    assert faults_in(table, KeysConfig) == (f"f.toml: [plugins.p] {fault}",)


@pytest.mark.parametrize("name", ["extra_headers", "settings", "timeouts", "model_map"])
def test_string_where_a_table_belongs_is_refused_without_printing_it(name: str) -> None:
    (fault,) = faults_in({"bindings": [{"name": "a", "type": "b", name: SECRET}]}, RoutingConfig)
    assert fault == f"f.toml: [plugins.p] bindings[0].{name}: must be a table, not a string"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(SECRET),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "env", "x"]), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([field.name for field in attrs.fields(KeysConfig)]), _JSON))
def test_no_table_makes_anything_but_a_config_or_faults_without_secrets(table: dict[str, Any]) -> None:
    faults: tuple[str, ...] = ()
    try:
        structure(table, KeysConfig, where="here")
    except ConfigurationError as error:
        faults = error.faults
    assert all(fault.startswith("here ") and SECRET not in fault for fault in faults)


@attrs.frozen
class Kinds:
    number: float = 0.0
    choice: Literal["a", "b"] = "a"
    maybe: int | None = None
    names: tuple[str, ...] = ()
    table: Mapping[str, int] = attrs.Factory(dict)


def test_whole_number_is_taken_for_a_number() -> None:
    assert structure({"number": 3}, Kinds, where="here") == Kinds(3.0)


def test_values_are_frozen_copies() -> None:
    found = structure({"names": ["x"], "table": {"a": 1}, "maybe": 2}, Kinds, where="here")
    assert found == Kinds(maybe=2, names=("x",), table={"a": 1})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Secret, "secret"),
        (Path, "path"),
        (tuple[str, ...], "list of string"),
        (int | None, "whole number"),
        (Mapping[str, Any], "table of anything"),
        (Literal["a", "b"], '"a", "b"'),
        (Kinds, "table"),
    ],
)
def test_reference_describes_types_in_words(kind: Any, words: str) -> None:
    assert describe(kind) == words


# --- secrets ------------------------------------------------------------------------------------------------


def test_secret_comes_from_a_file_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "pepper").write_text(f"  {SECRET}\n")
    config = structure({"pepper": {"file": "pepper"}}, KeysConfig, where="here", folder=tmp_path)
    assert config.pepper.reveal() == SECRET


@pytest.mark.parametrize(
    ("content", "fault"),
    [(None, "cannot be read: No such file"), (b"\n", "is empty"), (b"\xff", "is not text")],
)
def test_secret_file_that_gives_nothing_is_refused(tmp_path: Path, content: bytes | None, fault: str) -> None:
    if content is not None:
        (tmp_path / "pepper").write_bytes(content)
    with pytest.raises(ValueError, match=fault):
        read_secret({"file": "pepper"}, folder=tmp_path)


def test_secret_comes_from_the_environment() -> None:
    assert read_secret({"env": "A"}, {"A": SECRET}).reveal() == SECRET


def test_secrets_never_print() -> None:
    config = structure(
        {"pepper": SECRET, "keys": [{"name": "a", "secret": SECRET, "bindings": ["up"]}]},
        KeysConfig,
        where="here",
    )
    bindings = structure(
        {"bindings": [{"name": "a", "type": "openai", "credential": SECRET}]}, RoutingConfig, where="here"
    )
    for value in (config, bindings, config.pepper, [config], {"a": bindings}):
        assert SECRET not in f"{value!r} {value!s} {value}"
    assert f"{config.pepper}" == "Secret('…')"


@attrs.frozen
class _Deep:
    file: Path = Path("deep.log")


def _is_in_place(_: Any, __: Any, value: Path) -> None:
    if not value.is_absolute():
        raise ValueError("was looked at before it was resolved")


@attrs.frozen
class _Places:
    given: Path = Path("unused")
    file: Path = attrs.field(default=Path("own.log"), validator=_is_in_place)
    made: Path | None = attrs.field(factory=lambda: Path("made.log"))
    many: tuple[Path, ...] = (Path("a"), Path("/b"))
    named: Mapping[str, Path] = attrs.field(factory=lambda: {"x": Path("c")})
    none: Path | None = None
    deep: _Deep = attrs.field(factory=_Deep)
    beside: Path = attrs.field()
    word: str = "own.log"

    @beside.default
    def _beside(self) -> Path:
        return self.given / "beside"


@pytest.mark.parametrize("is_absolute", [True, False])
def test_default_paths_are_relative_to_the_configuration_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_absolute: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "conf"
    folder = here if is_absolute else Path("conf")
    found = structure({"given": "g"}, _Places, where="f.toml:", folder=folder)
    assert (found.given, found.file, found.made) == (here / "g", here / "own.log", here / "made.log")
    assert (found.many, found.named) == ((here / "a", Path("/b")), {"x": here / "c"})
    assert (found.none, found.deep.file, found.beside) == (None, here / "deep.log", here / "g" / "beside")
    assert found.word == "own.log"
    assert structure({"deep": {}}, _Places, where="f.toml:", folder=folder).deep.file == here / "deep.log"
    monkeypatch.chdir("/")  # a relative folder means another place now
    assert structure({"given": "g"}, _Places, where="f.toml:", folder=Path("conf")).given == Path("/conf/g")


def test_home_folder_is_spelled_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @attrs.frozen
    class Placed:
        given: Path
        file: Path = Path("~/own.log")
        token: Secret = Secret("")

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("t")
    table = {"given": "~/g", "token": {"file": "~/token"}}
    found = structure(table, Placed, where="f.toml:", folder=tmp_path)
    assert (found.given, found.file) == (tmp_path / "home" / "g", tmp_path / "home" / "own.log")
    assert found.token.reveal() == "t"
    with pytest.raises(ConfigurationError, match=r"f\.toml: given: .*home"):
        structure({"given": "~no-such-user-here/g"}, Placed, where="f.toml:", folder=tmp_path)


def test_paths_are_relative_to_the_configuration_file(tmp_path: Path) -> None:
    @attrs.frozen
    class Placed:
        there: Path | None = None

    for given_path, meant in (("a/b", tmp_path / "a" / "b"), ("/etc/x", Path("/etc/x"))):
        assert structure({"there": given_path}, Placed, where="f.toml:", folder=tmp_path).there == meant
    (fault,) = faults_in({"there": 3}, Placed)
    assert fault.endswith("there: must be a path, not a whole number")


@attrs.frozen
class Inner:
    size: int


@attrs.frozen
class Outer:
    name: str
    inner: tuple[Inner, ...]


def test_faults_of_a_converter_are_told_in_the_words_of_the_document() -> None:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    with pytest.raises(BaseValidationError) as raised:
        converter.structure({"nmae": "a", "inner": [{"size": 1}, {"size": "many", "x" * 100: 1}]}, Outer)
    found = dict(penstock.faults_of(raised.value, unknown="unknown member", missing="is required"))
    assert found["name"] == "is required"
    assert found["nmae"] == 'unknown member; did you mean "name"?'
    assert found["inner[1]." + "x" * 80] == "unknown member"
    assert "invalid literal" in found["inner[1].size"]
