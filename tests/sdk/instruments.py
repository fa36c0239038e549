"""A plugin for the SDK tests: refuses with the code a header names, and keeps retries short."""

from __future__ import annotations

from penstock import Exchange, Principal, RequestError, hookimpl


class Instruments:
    """Stand where rate limits, budgets and policies stand."""

    @hookimpl
    def authenticate(self, exchange: Exchange) -> Principal | None:
        """Ask SDKs to retry at once, where they retry at all; whether they do is what is tested."""
        exchange.reply_fields.append((b"retry-after-ms", b"1"))
        return None

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        """Refuse with the code of ``x-test-refuse``."""
        code = exchange.request.headers.get(b"x-test-refuse")
        if code is not None:
            rule = {"rule": "instruments"}
            raise RequestError(code.decode(), f"Refused by a test with {code.decode()}.", param="model", meta=rule)
