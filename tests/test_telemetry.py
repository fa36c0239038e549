"""One record per exchange, a bounded queue, and sinks whose failures cost traffic nothing."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence

import pytest

from fault_upstream import ANTHROPIC, OPENAI
from penstock import Exchange, PluginError, RequestError, hookimpl
from penstock import telemetry as telemetry_module
from penstock.log import Log
from penstock.telemetry import QUEUE_RECORDS, Record, Telemetry
from penstock.testing import SAMPLES, FakeUpstream, Harness, Reset, Stall, http_reply, sample_exchange, stream_reply
from recording import logging_to


class Kept:
    """Keep records, and whether it was closed."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.arrived = threading.Event()
        self.closed = 0

    def write(self, records: Sequence[Record]) -> None:
        self.records += records
        self.arrived.set()

    def close(self) -> None:
        self.closed += 1


class Failing(Kept):
    """Fail on every write."""

    def write(self, records: Sequence[Record]) -> None:
        raise RuntimeError("the collector is down")


class Hanging(Kept):
    """Hang in every write until released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def write(self, records: Sequence[Record]) -> None:
        self.arrived.set()
        self.released.wait(30)


class Broken(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError("gone")


def settled() -> Exchange:
    exchange = sample_exchange(SAMPLES[0])
    exchange.ended_ns = exchange.started_ns + 5
    exchange.status = 200
    return exchange


# --- one record per exchange ----------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_every_exchange_leaves_one_record_whatever_became_of_it() -> None:
    stall = Stall()
    upstream = FakeUpstream([[http_reply()], [http_reply(b"", 500)], [Reset()], stream_reply(*OPENAI.events), [stall]])
    async with Harness(upstream=upstream) as harness:
        await harness.request("POST", OPENAI.path, body={"model": "m", "messages": []})
        await harness.request("POST", OPENAI.path, body={"model": "m", "messages": []})
        await harness.request("POST", OPENAI.path, body={"model": "m", "messages": []})
        await harness.request("POST", OPENAI.path, body=OPENAI.body)
        await harness.request("POST", OPENAI.path, body=b"no JSON")
        await harness.request("POST", ANTHROPIC.path, {"x-api-key": "bad"}, ANTHROPIC.body)
        await harness.request("GET", "/nowhere")
        await harness.request("DELETE", OPENAI.path)
        client = await harness.raw()
        await client.send(harness.request_bytes("POST", OPENAI.path, body=OPENAI.body))
        await upstream.wait_requests(5)
        client.close()
        await harness.wait_settled(9)
        found = [(record.status, record.error, record.stream_end, record.route) for record in harness.records]
        chat = OPENAI.path
        assert found == [
            (200, None, "complete", chat),
            (500, None, "complete", chat),
            (502, "provider_error", None, chat),
            (200, None, "complete", chat),
            (400, "bad_request", None, chat),
            (401, "invalid_api_key", None, ANTHROPIC.path),
            (404, "not_found", None, ""),
            (405, "method_not_allowed", None, chat),
            (None, None, "client_gone", chat),
        ]
        assert len({record.request_id for record in harness.records}) == 9


@pytest.mark.anyio
async def test_record_says_who_asked_what_answered_and_what_it_took() -> None:
    upstream = FakeUpstream([stream_reply(*OPENAI.events)])
    async with Harness(upstream=upstream) as harness:
        reply = await harness.request("POST", OPENAI.path, body=OPENAI.body)
        (record,) = harness.records
        assert (record.key_id, record.key_prefix) == ("vk_test", harness.key[:17])
        assert (record.provider, record.binding_id, record.model) == ("openai_compatible", "gpc_up", "m")
        assert (record.is_stream, record.bytes_out) == (True, len(reply.raw.partition(b"\r\n\r\n")[2]))
        assert record.usage is not None
        assert (record.usage.all_input, record.usage.output) == (7, 3)
        assert record.principal is harness.exchanges[0].principal
        assert record.committed_ns is not None
        assert 0 < record.upstream_ns <= record.committed_ns <= record.duration_ns
        assert len(record.attempts) == 1


# --- the queue ------------------------------------------------------------------------------------------------------


def test_full_queue_drops_and_counts_and_keeps_the_oldest() -> None:
    sink = Kept()
    telemetry = Telemetry([sink])
    first, exchange = settled(), settled()
    telemetry.record(first)
    for _ in range(QUEUE_RECORDS + 4):
        telemetry.record(exchange)
    assert (telemetry.recorded, telemetry.dropped) == (QUEUE_RECORDS + 5, 5)
    telemetry.drain()
    assert len(sink.records) == QUEUE_RECORDS
    assert sink.records[0].request_id == first.request_id
    telemetry.record(exchange)
    assert telemetry.dropped == 5


def test_without_sinks_nothing_is_queued_and_no_thread_runs() -> None:
    telemetry = Telemetry()
    before = threading.active_count()
    telemetry.start()
    telemetry.record(settled())
    assert threading.active_count() == before
    assert (telemetry.recorded, telemetry.dropped, telemetry.queued) == (1, 0, 0)
    telemetry.stop()


def test_records_reach_sinks_on_a_thread_of_their_own() -> None:
    sink = Kept()
    telemetry = Telemetry([sink])
    telemetry.start()
    telemetry.record(settled())
    assert sink.arrived.wait(10)
    telemetry.stop()
    assert (len(sink.records), sink.closed, telemetry.dropped) == (1, 1, 0)


def test_stop_writes_what_is_queued_then_closes() -> None:
    sink = Kept()
    telemetry = Telemetry([sink])
    telemetry.start()
    for _ in range(1000):
        telemetry.record(settled())
    telemetry.stop()
    assert (len(sink.records), sink.closed) == (1000, 1)


def test_sink_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_module, "STOP_SECONDS", 0.05)
    sink = Hanging()
    telemetry = Telemetry([sink])
    telemetry.start()
    telemetry.record(settled())
    assert sink.arrived.wait(10)
    telemetry.record(settled())
    thread = telemetry._thread
    telemetry.stop()
    assert (telemetry.dropped, sink.closed) == (1, 0)
    sink.released.set()
    assert thread is not None
    thread.join(10)


# --- sinks and logs that fail ---------------------------------------------------------------------------------------


def test_failing_sink_is_counted_and_the_others_get_their_records() -> None:
    stream, sink = io.StringIO(), Kept()
    telemetry = Telemetry([Failing(), sink], Log("json", stream))
    for _ in range(3):
        telemetry.record(settled())
    telemetry.drain()
    assert (telemetry.dropped, len(sink.records)) == (3, 3)
    assert '"event":"telemetry sink failed"' in stream.getvalue()
    assert '"sink":"Failing"' in stream.getvalue()


def test_thread_survives_a_failing_sink_and_a_broken_log() -> None:
    sink = Kept()
    telemetry = Telemetry([Failing(), sink], Log("json", Broken()))
    telemetry.start()
    for _ in range(3):
        sink.arrived.clear()
        telemetry.record(settled())
        assert sink.arrived.wait(10)
    telemetry.stop()
    assert (len(sink.records), telemetry.dropped) == (3, 3)
    assert 1 <= telemetry.log.lost <= 3  # one message a failed write, whatever number of records it held


class Faulty:
    """Fail before the provider is asked."""

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        raise LookupError("no")


@pytest.mark.anyio
async def test_traffic_goes_on_with_a_broken_log_and_a_failing_sink() -> None:
    upstream = FakeUpstream([[http_reply()]], repeat=True)
    harness = Harness(upstream=upstream)
    telemetry = logging_to(harness, Broken(), Failing())
    async with harness:
        for _ in range(3):
            assert (await harness.request("POST", OPENAI.path, body={"model": "m"})).status == 200
        assert len(harness.records) == 3
        assert telemetry.dropped == 6
    harness = Harness([Faulty], upstream=upstream)
    logging_to(harness, Broken())
    async with harness:
        assert (await harness.request("POST", OPENAI.path, body={"model": "m"})).status == 500


# --- faults ---------------------------------------------------------------------------------------------------------


def fault_line(error: BaseException, exchange: Exchange | None = None) -> str:
    stream = io.StringIO()
    Telemetry(log=Log("json", stream)).report_fault(exchange, error)
    return stream.getvalue()


def test_fault_names_plugin_hook_request_and_place() -> None:
    exchange = settled()
    try:
        try:
            Faulty().pre_request(exchange)
        except LookupError as cause:
            raise PluginError("faulty", "pre_request") from cause
    except PluginError as error:
        line = fault_line(error, exchange)
    assert line.count("\n") == 1
    for part in ('"plugin":"faulty"', '"hook":"pre_request"', exchange.request_id.decode(), "LookupError", __file__):
        assert part in line


TEXTS = [
    (RequestError("bad_request", "said on purpose"), True),
    (OSError(2, "said by the system"), True),
    (AttributeError("said by the interpreter"), True),
    (KeyError("canary"), False),
    (ValueError("canary"), False),
    (UnicodeDecodeError("utf-8", b"canary", 0, 1, "canary"), False),
    (ExceptionGroup("canary", [ValueError("canary")]), False),
]


@pytest.mark.parametrize(("error", "is_shown"), TEXTS)
def test_text_of_an_exception_is_shown_only_where_it_cannot_quote_a_request(error: Exception, is_shown: bool) -> None:
    line = fault_line(error)
    assert type(error).__name__ in line
    assert ("said" in line) is is_shown
    assert "canary" not in line


def test_chained_and_grouped_exceptions_are_told_without_their_texts() -> None:
    error = ValueError("canary")
    error.add_note("canary")
    error.__context__ = KeyError("canary")
    error.__context__.__context__ = error
    group = BaseExceptionGroup("canary", [error, KeyboardInterrupt("canary")])
    line = fault_line(group)
    assert "canary" not in line
    for name in ("BaseExceptionGroup", "ValueError", "KeyError", "KeyboardInterrupt", "which led to"):
        assert name in line
