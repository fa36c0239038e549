"""The ASGI application: one Starlette route for each path, and every answer JSON."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import unquote

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as PathRoute
from starlette.types import ASGIApp, Receive, Send

from penstock.governance import ConflictError, LedgerUnavailableError, StoreUnavailableError
from penstock_plugins.management.faults import RefusedError
from penstock_plugins.management.ids import request_id
from penstock_plugins.management.rest.asks import (
    SMALL_BODY,
    Ask,
    read_body,
    read_json,
    read_query,
    read_version,
    token_of,
)
from penstock_plugins.management.rest.desk import Desk, Written
from penstock_plugins.management.rest.routes import PUBLIC, Route
from penstock_plugins.management.rest.table import ROUTES

PREFIX = "/v1"
_SLASH = "\x1f"
_request_id = re.compile(r"[!-~]{1,128}").fullmatch
_JSON = "application/json"


def make_app(desk: Desk) -> ASGIApp:
    """Return the application that answers below the mount's prefix."""
    paths: dict[str, dict[str, Route]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = route
    ordered = sorted(paths.items(), key=lambda item: ("{" in item[0], item[0].count("{")))
    routes = [PathRoute(PREFIX + path, _endpoint(desk, by_method)) for path, by_method in ordered]
    for routed in routes:
        routed.methods = set()  # any: what is not allowed is refused below, in the API's own words
    app = Starlette(routes=routes, exception_handlers={HTTPException: _missing})
    app.router.redirect_slashes = False  # Starlette would send the client, and its token, wherever Host says

    async def answer(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await app({**scope, "path": _routed(scope)}, receive, send)

    return answer


def _routed(scope: Mapping[str, Any]) -> str:
    """Return the path to route by: an encoded slash is part of a name, as in ``team%2Fproject``, and separates nothing.

    Until the name is read it is a control character, which no name can hold.
    """
    raw: bytes = scope.get("raw_path") or b""
    if b"%2f" not in raw.lower():
        return str(scope["path"])
    return unquote(raw.replace(b"%2F", b"%1F").replace(b"%2f", b"%1F").decode("latin-1"))


def _endpoint(desk: Desk, by_method: Mapping[str, Route]) -> Callable[[Request], Awaitable[Response]]:
    allowed = ", ".join(sorted({*by_method, "OPTIONS", *(("HEAD",) if "GET" in by_method else ())}))

    async def answer(request: Request) -> Response:
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": allowed})
        route = by_method.get("GET" if request.method == "HEAD" else request.method)
        if route is None:
            refused = RefusedError("method_not_allowed", f"{request.method[:20]} is not allowed here.")
            return _refusal(refused, {"allow": allowed})
        return await _answered(desk, route, request)

    return answer


async def _answered(desk: Desk, route: Route, request: Request) -> Response:
    identifier = request.headers.get("x-request-id", "")
    identifier = identifier if _request_id(identifier) else request_id()
    headers = {"x-request-id": identifier}
    try:
        ask = await _asked(desk, route, request, identifier)
        return _response(route, await desk.answer(route, ask), headers)
    except RefusedError as error:
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        return _refusal(error, headers)
    except (StoreUnavailableError, LedgerUnavailableError):
        refused = RefusedError("store_unavailable", "The store cannot be reached just now; try again.")
        return _refusal(refused, {**headers, "retry-after": "1"})
    except ConflictError:
        return _refusal(RefusedError("conflict", "The object changed meanwhile; read it again."), headers)


async def _asked(desk: Desk, route: Route, request: Request, identifier: str) -> Ask:
    """Return what is asked; what is wrong with it is told only to who presents a token."""
    try:
        raw = await read_body(request) if route.takes_body else b""
        if len(raw) > SMALL_BODY and route.permission != PUBLIC:
            await desk.authenticate(token_of(request))
        return _ask(route, request, identifier, raw)
    except RefusedError:
        if route.permission != PUBLIC:
            await desk.authenticate(token_of(request))
        raise


def _ask(route: Route, request: Request, identifier: str, raw: bytes) -> Ask:
    agent = request.headers.get("user-agent", "")
    path = str(request.scope["path"]).removeprefix(request.scope.get("root_path", "")).removeprefix(PREFIX)
    parts = {name: str(value).replace(_SLASH, "/") for name, value in request.path_params.items()}
    if any(len(value) > 1000 or "\x00" in value for value in parts.values()):
        raise RefusedError("not_found", "There is no such object here.")
    return Ask(
        method=route.method,
        path=path,
        parts=parts,
        query=read_query(request, tuple(route.query)),
        body=read_json(request, raw),
        raw=raw,
        version=read_version(request),
        once=request.headers.get("idempotency-key"),
        token=token_of(request),
        request_id=identifier,
        source="cli" if agent.startswith("penstock-cli") else "api",
    )


def _response(route: Route, written: Written, headers: dict[str, str]) -> Response:
    if written.version is not None:
        headers["etag"] = f'"{written.version}"'
    if written.is_replayed:
        headers["idempotent-replay"] = "true"
    headers["cache-control"] = "no-store" if route.is_secret else "no-cache"
    return Response(written.body, written.status, headers, media_type=_JSON)


def _refusal(error: RefusedError, headers: Mapping[str, str]) -> Response:
    body = msgspec.json.encode(error.body())
    return Response(body, error.status, {"cache-control": "no-store", **headers}, media_type=_JSON)


async def _missing(_request: Request, _error: Exception) -> Response:
    """Answer a path that is none of the API's."""
    return _refusal(RefusedError("not_found", "There is nothing at this path; see /api/v1/openapi.json."), {})
