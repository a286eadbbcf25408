"""Trace records for tests."""

from tasks.traces.record import TraceRecord, iso_from_us, uuid7

START_US = 1_800_000_000_000_001


def make_record(number, **changes):
    """A record as the gateway writes it; starts are 1.000003 s apart, so microseconds count."""
    start_us = START_US + number * 1_000_003
    usage = {"prompt_tokens": 1000, "completion_tokens": number, "total_tokens": 1000 + number}
    message = {"role": "assistant", "content": f"答え {number}"}
    fields = {
        "trace_id": uuid7(start_us, number),
        "started_at": iso_from_us(start_us),
        "first_token_at": iso_from_us(start_us + 1500),
        "ended_at": iso_from_us(start_us + 2500),
        "endpoint": "/v1/chat/completions",
        "route": "vllm",
        "reason": "no-lite-model",
        "model": "tiny",
        "status": "ok",
        "http_status": 200,
        "streamed": False,
        "request": {"model": "tiny", "messages": [{"role": "user", "content": f"質問 {number}"}]},
        "response": {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage},
        "usage": usage,
    }
    return TraceRecord(**(fields | changes))
