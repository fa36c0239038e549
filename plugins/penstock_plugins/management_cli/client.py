"""Ask the management API, one request at a time.

``http.client`` follows no redirect, so the token goes nowhere but where it was meant to; no message repeats it.
"""

from __future__ import annotations

import http.client
import json
import secrets
import ssl
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import attrs

from penstock import ConfigurationError
from penstock_plugins.management_cli.profile import Access

PATIENCE_SECONDS = 60.0
MAX_BYTES = 256 * 1024 * 1024
Query = Mapping[str, str | int | None]


class RefusedError(Exception):
    """Say in one line what was refused or failed, by which rule, and the way out."""

    def __init__(self, message: str, *, status: int = 0, code: str = "", meta: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.meta = meta or {}


@attrs.frozen
class Answer:
    """Hold a successful answer."""

    status: int
    headers: Mapping[str, str]
    """Lower-case names."""
    raw: bytes = attrs.field(repr=False)

    @property
    def content(self) -> Any:
        """Return the JSON; None for an empty body. Raises RefusedError for anything else."""
        if not self.raw:
            return None
        try:
            return json.loads(self.raw)
        except ValueError:
            raise RefusedError(f"the answer is no JSON (status {self.status}); is this a Penstock gateway?") from None


def path_of(*parts: str) -> str:
    """Return a path below ``/api/v1``, each part quoted whole."""
    return "/" + "/".join(quote(part, safe="") for part in parts)


@attrs.define(eq=False)
class Api:
    """Ask one gateway."""

    access: Access
    timeout: float = PATIENCE_SECONDS
    _connection: http.client.HTTPConnection | None = attrs.field(default=None, init=False, repr=False)

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        query: Query | None = None,
        etag: str | None = None,
        idempotency_key: str | None = None,
    ) -> Answer:
        """Return the answer. Raises RefusedError for a refusal, and where there is none."""
        headers = {
            "Authorization": f"Bearer {self.access.token}",
            "Accept": "application/json",
            "User-Agent": "penstock-cli",
        }
        content = None
        if body is not None:
            try:
                content = json.dumps(body, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ConfigurationError("arguments: hold bytes that are no UTF-8 text") from None
            headers["Content-Type"] = "application/json"
        if method == "POST":
            headers["Idempotency-Key"] = idempotency_key or secrets.token_hex(16)
        if etag is not None:
            headers["If-Match"] = etag
        given = {name: value for name, value in (query or {}).items() if value is not None}
        place = urlsplit(self.access.url).path + "/api/v1" + path + ("?" + urlencode(given) if given else "")
        answer = self._send(method, place, content, headers)
        if answer.status >= 300:
            raise _refusal(answer, self.access)
        return answer

    def get(self, path: str, query: Query | None = None) -> Any:
        """Return what is read."""
        return self.request("GET", path, query=query).content

    def post(self, path: str, body: object = None) -> Any:
        """Return what was made or done."""
        return self.request("POST", path, {} if body is None else body).content

    def pages(self, path: str, query: Query) -> Iterator[dict[str, Any]]:
        """Yield the pages of a list from ``query["cursor"]`` on."""
        cursor = query.get("cursor")
        while True:
            page = self.get(path, {**query, "cursor": cursor})
            if not isinstance(page, dict) or not isinstance(page.get("data"), list):
                raise RefusedError(f"{path}: the answer is no list; is this a Penstock gateway?")
            yield page
            following = page.get("next_cursor")
            if following is None or following == cursor:
                return
            cursor = following

    def close(self) -> None:
        """Let go of the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # --- transport --------------------------------------------------------------------------------------------

    def _send(self, method: str, place: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        """Send once more where a kept connection turns out to be closed; a POST gets a fresh one, and one try."""
        if method == "POST":
            self.close()
        for is_kept in (self._connection is not None, False):
            connection = self._connection or self._connect()
            try:
                connection.request(method, place, body, dict(headers))
                response = connection.getresponse()
                raw = response.read(MAX_BYTES)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if not is_kept or isinstance(error, TimeoutError):
                    raise RefusedError(self._unreachable(error)) from None
            else:
                found = {name.lower(): value for name, value in response.getheaders()}
                return Answer(response.status, found, raw)
        raise AssertionError("the second attempt returns or raises")

    def _connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.access.url)
        assert parts.hostname is not None
        if parts.scheme == "https":
            context = ssl.create_default_context()
            self._connection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=self.timeout, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=self.timeout)
        return self._connection

    def _unreachable(self, error: Exception) -> str:
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = f"its certificate is not trusted: {error.verify_message}; SSL_CERT_FILE names a bundle to trust"
        elif isinstance(error, TimeoutError):
            reason = f"no answer within {self.timeout:g} s"
        elif isinstance(error, OSError):
            reason = error.strerror or str(error)
        else:
            reason = f"the answer is no HTTP ({type(error).__name__})"
        return f"{self.access.url} (from {self.access.origin}) cannot be asked: {reason}"


def _refusal(answer: Answer, access: Access) -> RefusedError:
    """Return the API's error as one line."""
    try:
        error = answer.content["error"]
        code, message = str(error["code"]), " ".join(str(error["message"]).split())
        meta = error.get("meta") if isinstance(error.get("meta"), dict) else {}
    except (RefusedError, KeyError, TypeError):
        code, message, meta = "", "", {}
    if not message:
        message = (
            f"{access.url} answers {answer.status} and no reason; it may be no Penstock gateway, or one without "
            "the management plugin"
        )
    if answer.status == 401:
        message += (
            f" (token from {access.token_origin or access.origin}; 'penstock login' or PENSTOCK_TOKEN gives another)"
        )
    return RefusedError(f"{message} [{code}]" if code else message, status=answer.status, code=code, meta=meta)
