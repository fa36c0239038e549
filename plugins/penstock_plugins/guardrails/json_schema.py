"""``json_schema``: have answers be JSON of a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from penstock import ALLOW, Check, Direction, Subject, Verdict


@attrs.frozen(kw_only=True)
class JSONSchemaSettings:
    """Settings of ``json_schema``."""

    schema: Mapping[str, Any]
    """JSON Schema, 2020-12 unless its ``$schema`` says otherwise; references stay within it."""


class JSONSchemaCheck(Check):
    """Validate what an answer says; reasoning and arguments of tools are no part of it."""

    def __init__(self, settings: JSONSchemaSettings) -> None:
        import jsonschema_rs  # noqa: PLC0415 - nobody pays for it who has no schema

        try:
            self._validator = jsonschema_rs.validator_for(dict(settings.schema), retriever=_refuse)
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as error:
            first = str(error).partition("\n")[0]
            raise ValueError(f"schema: is no JSON Schema: {first[:200]}") from None

    def judge(self, subject: Subject) -> Verdict:
        """Block an answer that is no JSON, or other JSON."""
        for text, kind in zip(subject.texts, subject.kinds or ("content",) * len(subject.texts), strict=True):
            if kind != "content" or not text.strip():
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                return Verdict("block", "no JSON")
            if not self._validator.is_valid(value):
                return Verdict("block", "not of the schema")
        return ALLOW


def _refuse(uri: str) -> Any:
    raise ValueError(f"references stay within the schema, and {uri[:100]} does not")


class JSONSchema:
    """Block answers that do not fit a JSON Schema."""

    type = "json_schema"
    directions: frozenset[Direction] = frozenset(("response",))
    settings = JSONSchemaSettings

    def prepare(self, settings: JSONSchemaSettings) -> JSONSchemaCheck:
        """Return the check. Raises ValueError."""
        return JSONSchemaCheck(settings)
