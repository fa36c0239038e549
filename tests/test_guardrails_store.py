"""Guardrails of the store: written with faults named, attached, changed under traffic, entered in the ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from governed_gateway import ANSWERED, BODY, CHAT, Governed, always, governed
from guarded_gateway import CARD, SHAPES
from management_client import PLUGINS, Api, running_api
from penstock import GuardrailAttachment, GuardrailCounts
from penstock.governance import new_id
from penstock.governance.objects import Evaluator, Guardrail
from penstock.testing import http_reply
from penstock_plugins.guardrails import Guardrails

pytestmark = pytest.mark.anyio
USED = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


async def refused(api: Api, path: str, body: dict[str, Any], *told: str) -> None:
    answered = await api.ask("POST", path, body)
    assert answered.status == 400, answered.raw
    for each in told:
        assert each in json.dumps(answered.error), answered.error


async def test_evaluator_and_guardrail_are_refused_naming_the_field() -> None:
    async with running_api(plugins=(*PLUGINS, ("guardrails", Guardrails))) as api:
        await refused(api, "/evaluators", {"name": "a", "type": "piii"}, '"type"', "did you mean")
        await refused(
            api, "/evaluators", {"name": "a", "type": "pii", "settings": {"kind": 1}}, "settings.kind", "kinds"
        )
        broken = {"name": "a", "type": "regex", "settings": {"patterns": ["("]}}
        await refused(api, "/evaluators", broken, "settings.patterns[0]", "no RE2 pattern")
        await api.make("/evaluators", {"name": "words", "type": "regex", "settings": {"action": "redact"}})
        await refused(api, "/guardrails", {"name": "g", "evaluator": "words"}, "settings.patterns", "missing")
        settings = {"patterns": ["bluebird"]}
        await api.make("/guardrails", {"name": "g", "evaluator": "words", "settings": settings})
        await api.make("/evaluators", {"name": "shape", "type": "json_schema", "settings": {"schema": {}}})
        await refused(api, "/guardrails", {"name": "h", "evaluator": "shape"}, "directions", "response only")
        leaking = {"name": "x", "type": "http", "settings": {"url": "http://x", "key_env": "PENSTOCK_MASTER_KEY"}}
        await refused(api, "/evaluators", leaking, "settings.key_env")


async def make_guardrail(gateway: Governed, kind: str, settings: dict[str, Any], **more: Any) -> str:
    evaluator_id, guardrail_id = new_id("ev_"), new_id("gr_")
    scope = gateway.organization_id
    evaluator = Evaluator(name=f"e{evaluator_id}", scope_id=scope, type=kind, settings=settings)
    await gateway.insert("evaluator", evaluator, evaluator_id)
    guardrail = Guardrail(name=f"g{guardrail_id}", scope_id=scope, evaluator_id=evaluator_id, **more)
    await gateway.insert("guardrail", guardrail, guardrail_id)
    return guardrail_id


async def attach(gateway: Governed, *attachments: GuardrailAttachment) -> None:
    documents = [attrs.asdict(each) for each in attachments]
    await gateway.change("virtual_key", gateway.key_id, guardrails=documents)


async def test_blocked_answer_is_entered_with_its_cost_which_counts_to_no_cap(tmp_path: Path) -> None:
    whole = json.loads(SHAPES[0].whole(f"it is {CARD}")) | {"usage": USED}
    upstream = always(http_reply(json.dumps(whole).encode()))
    async with governed(tmp_path, upstream, plugins=[Guardrails]) as gateway:
        budget_id = await gateway.budget(100 * ANSWERED)
        settings = {"action": "block"}
        guardrail_id = await make_guardrail(gateway, "pii", settings, directions=("response",))
        assert (await gateway.ask()).status == 200
        await attach(gateway, GuardrailAttachment(guardrail_id=guardrail_id))
        reply = await gateway.harness.request("POST", CHAT, body=BODY)
        assert (reply.status, reply.header("X-Penstock-Error")) == (403, "guardrail_blocked")
        passed, blocked = await gateway.rows()
        assert passed.debits
        assert (blocked.outcome, blocked.error, blocked.debits) == ("refused", "guardrail_blocked", ())
        assert blocked.cost_nano_usd == ANSWERED
        assert await gateway.total(budget_id) == ANSWERED
        assert gateway.get(GuardrailCounts).items()[0][0][1:] == ("response", "block")
        await attach(gateway)
        assert (await gateway.ask()).status == 200


async def test_guardrail_that_is_gone_or_cannot_be_made_is_closed_unless_told_otherwise(tmp_path: Path) -> None:
    async with governed(tmp_path, plugins=[Guardrails]) as gateway:
        odd = await make_guardrail(gateway, "of another plugin", {})
        for name in (odd, "gr_gone"):
            await attach(gateway, GuardrailAttachment(guardrail_id=name))
            reply = await gateway.ask()
            assert (reply.status, reply.header("X-Penstock-Error")) == (503, "guardrail_unavailable")
            await attach(gateway, GuardrailAttachment(guardrail_id=name, fail_open=True))
            assert (await gateway.ask()).status == 200
