"""What a trace costs the gateway, and what redaction costs a kilobyte: CPU time, one JSON line each.

python tests/bench/bench_traces.py        median and best of seven, spread; the first is dropped

`record`: begin, fill, finish of one chat (redaction of secrets, JSON, one write), 2 x 100 or 2 x 2000 characters.
`redact`: a record of 21 kB of prose, per kB of its line; hostile text is in test_redaction.py.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deployments.gateway.recorder import Recorder
from deployments.gateway.settings import Settings
from deployments.gateway.trace_settings import TraceSettings
from tasks.traces.record import TraceRecord, iso_from_us, uuid7
from tasks.traces.redaction import KINDS, Redactor

REPEATS, RECORDS = 8, 1000
ENGLISH = "The quick brown fox explains how a task-based system works in 2024, with 3.14 and a few words more. "
JAPANESE = "日本の祭りについて説明します。夏祭りは7月から8月にかけて行われます。"
TEXTS = {
    "english": ENGLISH * 100,
    "japanese": JAPANESE * 100,
    "a secret per kB": (ENGLISH * 10 + "password: abc12345 ") * 10,
}


def timed(call: Callable[[], object], times: int) -> list[float]:
    """CPU microseconds of one call, measured REPEATS times over `times` calls."""
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        for _ in range(times):
            call()
        found.append((time.process_time() - start) / times * 1e6)
    return found[1:]


def report(name: str, values: list[float], unit: str) -> None:
    """Print one JSON line."""
    median = statistics.median(values)
    spread = round(100 * (max(values) - min(values)) / median, 1)
    line = {"name": name, "machine": platform.machine(), unit: round(median, 2), "best": round(min(values), 2)}
    sys.stdout.write(json.dumps(line | {"spread_pct": spread}) + "\n")


def bench_record(folder: Path, kinds: frozenset[str], chars: int) -> None:
    """One whole trace, as a request pays for it."""
    recorder = Recorder(Settings(queue_path=folder / f"{len(kinds)}-{chars}.jsonl"), TraceSettings(kinds=kinds))
    recorder.open()
    text = (ENGLISH * 30)[:chars]
    message = {"role": "assistant", "content": text}
    request = {"model": "m", "messages": [{"role": "user", "content": text}]}
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    answer = {"id": f"chatcmpl-{'0123456789abcdef' * 2}", "model": "m", "choices": choices, "usage": usage}

    def one() -> None:
        recording = recorder.begin("/v1/chat/completions")
        recording.request = request
        recording.note_first()
        recording.finish("ok", 200, answer)

    report(
        f"record, 2 x {chars} characters, redacting {','.join(sorted(kinds)) or 'nothing'}", timed(one, RECORDS), "us"
    )


def bench_redact(name: str, text: str, kinds: tuple[str, ...]) -> None:
    """Redaction alone, per kB."""
    start = 1_800_000_000_000_000
    at = iso_from_us(start)
    body = {"messages": [{"role": "user", "content": text}]}
    answer = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    record = TraceRecord(
        trace_id=uuid7(start, 1),
        started_at=at,
        ended_at=at,
        endpoint="/v1/chat/completions",
        route="vllm",
        reason="none",
        model="m",
        status="ok",
        http_status=200,
        streamed=False,
        request=body,
        response=answer,
    )
    fields = record.to_dict()
    redactor, kilobytes = Redactor(kinds=frozenset(kinds)), len(record.to_line()) / 1000
    values = [spent / kilobytes for spent in timed(lambda: redactor.redact(fields), 20)]
    report(f"redact {','.join(kinds)}: {name}", values, "us_per_kB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for chars in (100, 2000):
            for kinds in (frozenset[str](), frozenset({"secrets"}), frozenset(KINDS)):
                bench_record(Path(place), kinds, chars)
    for kinds in (("secrets",), ("secrets", "email"), KINDS):
        for name, text in TEXTS.items():
            bench_redact(name, text, kinds)
