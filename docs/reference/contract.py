"""The page of every hook, of what is set when, and of declared needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from penstock import hookspecs
from penstock.hooks import ONCE, PER_EXCHANGE
from penstock.plugins import NEEDS
from reference.source import row

_HOOKS_HEAD = """
# Hooks

Every hook, in the order of one exchange, from `penstock.hookspecs`. A plugin implements those it needs:

```python
from penstock import Exchange, RequestError, hookimpl


class NoSecondChoices:
    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        if exchange.request.endpoint.operation == "completions":
            raise RequestError("permission_denied", "Use /v1/chat/completions instead.")
```

"""


def hooks_page() -> str:
    text = _HOOKS_HEAD + cell_paragraphs(inspect.getdoc(hookspecs) or "")
    for title, names in (("Once, at start-up", ONCE), ("Per exchange", PER_EXCHANGE)):
        text += f"\n## {title}\n"
        for name in names:
            specification = getattr(hookspecs, name)
            text += f"\n### `{name}`\n\n```text\n{signature_of(name, specification)}\n```\n\n"
            text += cell_paragraphs(inspect.getdoc(specification) or "") + _MORE.get(name, "")
    return text + _ORDER + _validity() + _needs()


def cell_paragraphs(text: str) -> str:
    """Return a docstring as Markdown, a line per `Word: …` as a list entry."""
    lines: list[str] = []
    for line in text.replace("``", "`").splitlines():
        word, colon, _ = line.partition(":")
        is_entry = bool(colon) and word in ("When", "Returns", "Raises")
        lines.append(f"\n- **{word}**{line[len(word) :]}" if is_entry else line)
    return "\n".join(lines) + "\n"


def signature_of(name: str, specification: Callable[..., Any]) -> str:
    signature = inspect.signature(specification)
    taken = [f"{parameter.name}: {parameter.annotation}" for parameter in signature.parameters.values()]
    return f"def {name}({', '.join(('self', *taken))}) -> {signature.return_annotation}"


_LIFESPAN = """
`@hookimpl` stands above `@asynccontextmanager`, which makes the generator into what the hook returns:

```python
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from penstock import hookimpl


class Ticking:
    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:  # a background task for as long as the plugin lives
            tasks.start_soon(self._tick)
            yield
            tasks.cancel_scope.cancel()

    async def _tick(self) -> None:
        while True:
            await anyio.sleep(60)
```

- **Per object.** A reload (SIGHUP) makes new objects of all plugins and enters their lifespans; the old ones are left
  once their last exchange has ended, which a long stream may put off. So for a while two objects of the class are live:
  what both would open (a file to append to, a port, a lock) has to bear that, or is shared by
  [`services.shared`](api.md#services).
- **Per worker.** With `workers = 4` four processes do the same, each with its own objects: counters and caches in
  memory are per process, and a job that must run once must not be a background task here.
- `penstock check` enters and leaves them as well.
"""
_RECORDING = """
What it finds, by what happened; `exchange.attempts` tells of each try:

| what happened | `status` | `error` | `candidate` | `usage` | `stream_end` |
| --- | --- | --- | --- | --- | --- |
| a provider answered | its status | None | who answered | counted or estimated, None for errors | `complete` |
| it broke off in the middle | as sent | None | who answered | estimated from what came | `upstream_failed` |
| a chunk hook refused | as sent | the refusal | who answered | estimated from what came | `blocked` |
| the client left in the middle | as sent | None | who answered | estimated from what came | `client_gone` |
| the client left before an answer | None | None | who was asked, or None | None | `client_gone` |
| no provider gave an answer | 502 or 504 | the refusal | the last one asked | None | None |
| a hook refused | its code's | the refusal | None, or who was to be asked | None | None |
| a plugin answered (model listings too) | its answer's | None | None | None | None |
| 404, 405 | 404, 405 | the refusal | None, and no `principal` | None | None |

May it block? A short write is fine: a line to a local file, a message to a queue. It runs on the event loop that serves
everybody else, so what may take longer goes to `await anyio.to_thread.run_sync(…)`, within the five seconds it has, or,
better, into a queue that a task of the lifespan drains: [Record what
happened](writing.md#record-what-happened) shows that.
"""
_MORE = {"lifespan": _LIFESPAN, "post_response": _RECORDING}
"""What a page says below the text of a hook itself."""
_ORDER = """
## The order of plugins

`plugins = ["virtual_keys", policies…, "routing", providers…]`. The order decides in `pre_request`, `select_provider`,
`on_stream_chunk` and `lifespan`, and reversed in `post_response`:

- **Policies stand before routing.** A Response or a RequestError out of `pre_request` ends the chain, and routing
  answers `GET /v1/models` in its own `pre_request`: a plugin behind it does not see these requests there.
- What rewrites requests stands before what judges them, so that a guard judges what is sent.
- `store` stands first: others ask it as they start. `budgets` stands after routing, which says who may be asked;
  `rate_limits` before it.
- Who authenticates may stand anywhere: `authenticate` of all comes before `pre_request` of all.
- `post_response` of every plugin runs for every exchange, refused ones included, so it may find nothing of what another
  hook of the same plugin would have left in `exchange.state`.
- Plugins that only bring providers may stand anywhere.

**Some answers pass no hook but `post_response`.** An unknown path (404; its `endpoint.dialect` is `openai.unknown`,
`anthropic.unknown` or `gemini.unknown`, by how the client looks) and a wrong method (405) are refused before
`authenticate`; a caller nobody knows (401) and a body over the limit (413) before `pre_request`. So what `pre_request`
puts into `reply_fields` is not on these answers. A request that is no HTTP makes no exchange at all.
"""
VALIDITY = (
    (
        "authenticate",
        "from the start",
        "request_id request trace namespace started_ns started_at_ns client state reply_fields cache_mode",
        "",
    ),
    ("pre_request", "after authenticate", "principal", "None where nobody authenticates."),
    (
        "pre_request",
        "once a hook asked",
        "chunk_watchers response_watchers",
        "`watch_chunks` and `watch_response` set them; the first is empty, not None, where a plugin sees all chunks.",
    ),
    (
        "pre_request",
        "once routing has resolved the model",
        "chain fallback",
        "For the plugins after it: the candidates, in order. Empty where the model is not known or another selects.",
    ),
    (
        "pre_request",
        "once a cache rule matched",
        "cache_rule_id",
        "Set with `cache_mode`, by the plugin `caching`; None where no rule did.",
    ),
    (
        "pre_request",
        "once a plugin excluded a binding",
        "excluded",
        "`exchange.exclude` adds to it.",
    ),
    (
        "select_provider",
        "per attempt",
        "attempts candidate",
        "Empty and None at the first attempt. Then `attempts` holds those that failed, `candidate` the last one tried.",
    ),
    (
        "on_response",
        "where the candidate speaks another dialect",
        "upstream_endpoint params_dropped",
        "None and empty where nothing was translated.",
    ),
    (
        "on_stream_chunk",
        "once the answer is the client's",
        "status is_stream",
        "`is_stream` is False before, also where the client asks for a stream: that is `exchange.peek.stream`.",
    ),
    (
        "post_response",
        "at the end",
        "error stream_end committed_ns upstream_ns ended_ns bytes_out chunks_out usage window",
        "`stream_end` is `complete` for whole answers too. `usage` and `window` are None where no provider answered.",
    ),
)
"""The first hook that finds fields of an exchange set, when they are, which, and what to know about them."""
_VALIDITY_HEAD = """
## What is set when

`exchange.peek` (what the request body says: `model`, `stream`, `user` and so on) and `exchange.request.endpoint`
(`dialect`, `operation`, `family`) can be asked in every hook. `peek` raises RequestError for a body that is no JSON
object and no form, also for the empty one of `GET /v1/models`: ask only where `exchange.request.endpoint.has_model`.

"""
_VALIDITY_FOOT = """
"Does the client want a stream?" is `exchange.peek.stream`; "is this a chat completion?" is
`exchange.request.endpoint.dialect == "openai.chat"`. `reply_fields` count until the first byte goes to the client, so
add to it in `authenticate`, `pre_request`, `select_provider` or `admit_attempt`. A plugin's own values belong into
`exchange.state`:

```python
from penstock import Exchange, StateKey, hookimpl

ASKED_AT: StateKey[float] = StateKey("clocked.asked_at")  # once per module: keys compare by identity


class Clocked:
    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        exchange.state[ASKED_AT] = exchange.started_ns / 1e9

    @hookimpl
    def post_response(self, exchange: Exchange) -> None:
        asked_at = exchange.state.get(ASKED_AT)  # None where the exchange was refused before
```
"""


def _validity() -> str:
    text = _VALIDITY_HEAD + row("set for", "when", "fields of `exchange`", "") + row("---", "---", "---", "---")
    for hook, when, fields, note in VALIDITY:
        text += row(f"`{hook}`", when, ", ".join(f"`{field}`" for field in fields.split()), note)
    return text + _VALIDITY_FOOT


_NEED_ROWS = {
    "reads_body": ("the plugin looks into request bodies", "shown"),
    "edits_body": (
        "it may assign `exchange.request` a copy with another body",
        "shown; the checkers let requests change",
    ),
    "sees_chunks": (
        "its `on_stream_chunk` runs on every exchange",
        "**enforced**: without it the hook runs only where `exchange.watch_chunks(name)` was called",
    ),
    "edits_chunks": ("its `on_stream_chunk` may return other bytes", "shown; the checkers let responses change"),
}
_NEEDS_FOOT = """
A misspelt attribute is refused when the plugin is loaded. `penstock plugins show` prints the needs and says whether
bytes still pass untouched. While serving, only `sees_chunks` has an effect: nobody stops a plugin that declares no
edits from making some. [`check_plugin`](testing.md#checks-that-come-with-it) finds those that its requests and drawn
bodies bring about, so an edit that only some rare word triggers needs a test of its own.

`enforces`, a tuple of names, says which members of a principal hold because of the plugin: `policy_rules`, `guardrails`
or `rate_limits`. A key that has one of them where no enabled plugin enforces it is refused with 503
`policy_rules_invalid`: a plugin left out must not mean that anything goes.
"""


def _needs() -> str:
    text = "\n## Declared needs\n\nClass attributes without an annotation, each `False` unless set:\n\n"
    text += row("attribute", "says", "what follows") + row("---", "---", "---")
    return text + "".join(row(f"`{need}`", *_NEED_ROWS[need]) for need in NEEDS) + _NEEDS_FOOT
