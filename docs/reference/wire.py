"""The pages of errors, endpoints and commands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import msgspec

from penstock import RequestError
from penstock.cli import cli
from penstock.endpoints import ALL
from penstock.envelopes import error_response
from penstock.errors import RETRY_CURES, STATUS_OF_CODE
from reference.source import row

_OPENAI_CLASSES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    429: "RateLimitError",
}
_ANTHROPIC_CLASSES = _OPENAI_CLASSES | {
    413: "RequestTooLargeError",
    503: "ServiceUnavailableError",
    504: "DeadlineExceededError",
}
_ERRORS_HEAD = """
# Errors

Two kinds of errors reach a client, and `X-Penstock-Error` tells them apart:

- **The provider's**: status, headers and body are the provider's own, untouched. There is no `X-Penstock-Error`.
- **The gateway's**: written in the envelope of the route's dialect, so that the official SDKs raise their usual
  exception class, with the code in `X-Penstock-Error`. The message says what was refused, by which rule, and what to
  do; it holds no secret and no prompt text.

A refusal that a retry cannot cure carries `x-should-retry: false`, which the official SDKs obey.

## Codes

"SDK class" is the exception of the OpenAI and Anthropic Python SDKs; one name where both use the same. Newer SDKs may
raise a subclass of it, as Anthropic's does for 402: `PaymentRequiredError`. The management API has
[errors of its own](api.md#errors).
"""
_ERRORS_MIDDLE = """
Plugins may refuse with [codes of their own](plugins/writing.md#refusing), and a status of their choice.

## Envelopes

The same refusal on routes of each dialect (`meta` holds what the rule knows, such as the models that can be called):
"""
_ERRORS_FOOT = """
## After the first byte

Once a stream has begun, an error can no longer be a status. What the client gets then is in
[Streaming](streaming.md#when-it-breaks): one event `error`, and a connection that closes without a clean end. Codes:

| code | what happened |
| --- | --- |
| `upstream_mid_stream_failure` | the provider broke off |
| `stream_chunk_blocked` | a plugin's chunk hook refused with `guardrail_blocked` |
| a plugin's code | a chunk hook refused with another RequestError |
| `plugin_error` | a chunk hook failed |
"""


def errors_page() -> str:
    text = _ERRORS_HEAD + "\n" + row("code", "status", "Anthropic's type", "SDK class", "retry cures it")
    text += row(*("---",) * 5)
    for code, status in STATUS_OF_CODE.items():
        error = RequestError(code, "")
        kind = _json_of(error, "anthropic")["error"]["type"]
        ours, theirs = (_class(status, known) for known in (_OPENAI_CLASSES, _ANTHROPIC_CLASSES))
        classes = f"`{ours}`" if ours == theirs else f"`{ours}`, `{theirs}`"
        text += row(f"`{code}`", str(status), f"`{kind}`", classes, "yes" if error.should_retry else "no")
    text += _ERRORS_MIDDLE
    example = RequestError(
        "model_not_recognized", "No provider binding of this virtual key serves the model 'gpt-9'.",
        param="model", meta={"models": ["gpt-5-mini"]},
    )  # fmt: skip
    for family, title in (("openai", "OpenAI"), ("anthropic", "Anthropic"), ("gemini", "Gemini")):
        body = error_response(example, family, b"req_019a0000000000000000000000000a", "penstock").body
        text += f"\n{title}:\n\n```json\n{_pretty(body)}\n```\n"
    cures = ", ".join(f"`{code}`" for code in sorted(RETRY_CURES))
    return text + f"\nRefusals that pass with time: {cures}.\n" + _ERRORS_FOOT


def _class(status: int, known: dict[int, str]) -> str:
    return known.get(status, "InternalServerError" if status >= 500 else "APIStatusError")


def _json_of(error: RequestError, family: str) -> Any:
    return msgspec.json.decode(error_response(error, family, b"req_", "penstock").body)


def _pretty(body: bytes) -> str:
    return msgspec.json.format(body, indent=2).decode()


_ENDPOINTS_HEAD = """
# Endpoints

No request is checked against a schema: fields, roles, tools and query strings that no schema knows yet all pass.
An unknown path is 404 `not_found`, a known one with another method 405 `method_not_allowed` with `Allow`. A WebSocket
upgrade on `/v1/responses` is 426 `websocket_unavailable`, on which Codex falls back to event streams.

"""
_ENDPOINTS_FOOT = """
`GET /v1/models` answers in Anthropic's shape where `anthropic-version` is sent, else in OpenAI's.
The answers of `/v1beta/…` need an enabled plugin whose provider speaks `gemini.generate`.

Beside them:

| method and path | answer |
| --- | --- |
| GET `/healthz` | 200 while the process is alive |
| GET `/readyz` | 200 while it takes traffic; 503 `starting` before plugins are up, 503 `draining` from SIGTERM on |
| GET, HEAD `/` | 200, for clients that probe |

Plugins mount further paths with [`register_routes`](plugins/hooks.md#register_routes).
"""


def endpoints_page() -> str:
    text = _ENDPOINTS_HEAD + row("method", "path", "dialect") + row("---", "---", "---")
    for endpoint in ALL:
        methods = ", ".join(method.decode() for method in endpoint.methods)
        text += row(methods, f"`{endpoint.path}`", f"`{endpoint.dialect}`")
    return text + _ENDPOINTS_FOOT


_CLI_HEAD = """
# Command line

Results go to standard output, messages to standard error. Exit status 0 is success, 1 a refusal or failure, 2 a fault
of configuration or usage (one line each), 130 an interruption. Plugins named in `penstock.toml` of the current folder
may add commands.

Commands about keys, budgets and all else in a store ask the [management API](api.md) of a running gateway, which they
[find by themselves](operations.md#how-the-commands-find-a-gateway). `--format json` prints what the API answers. What
cannot be undone is asked about on a terminal, and needs `--yes` elsewhere. Where an id is taken, so is a name or slug;
one that several have is refused, and the ids are listed.
"""


def cli_page() -> str:
    return _CLI_HEAD + "".join(_commands(cli, click.Context(cli, info_name="penstock", **cli.context_settings)))


def _commands(group: click.Group, parent: click.Context) -> Iterator[str]:
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        if command is None:
            continue
        context = click.Context(command, parent=parent, info_name=name, terminal_width=100, max_content_width=100)
        if isinstance(command, click.Group):
            yield from _commands(command, context)
        else:
            yield f"\n## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
