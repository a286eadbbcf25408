"""From adapter to tokens at gpt-oss-20b's true shapes: merge 42 GB, start vLLM on the result, ask it.

    python tests/bench/bench_serve_20b.py merge     `cp`, our merge, and with --peft PEFT's own, on one disk
    python tests/bench/bench_serve_20b.py serve     vLLM as `tatara services` starts it, directly and behind the gateway

Random bf16 weights, LoRA r=8 on attention and all experts. BENCH_DIR holds base, adapter and what is merged (130 GB
of disk); a second call goes on with them. `serve` needs a CUDA device, vLLM (its interpreter: TATARA_VLLM_PYTHON,
default this one), aiohttp, and in TOKENIZER_DIR the tokenizer and o200k_base.tiktoken. Each prints one JSON line and
writes it to $OUT.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
WORK = Path(os.environ.get("BENCH_DIR", "/tmp/bench-20b"))
PROMPT_TOKENS, ANSWER_TOKENS, CONCURRENT = 512, 256, (1, 64, 256)
VLLM_PORT, GATEWAY_PORT = 18_000, 18_001


def make_inputs() -> None:
    """Make base and adapter, once."""
    from tests.bench.bench_merge import ATTENTION, EXPERTS, shape_20b
    from tests.merging import write_adapter

    if not (WORK / "base").exists():
        code = "from tests.bench.bench_train_20b import write_base; from pathlib import Path; "
        code += f"write_base(Path({str(WORK / 'base.partial')!r}))"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)  # a child: it takes the GPU
        (WORK / "base.partial").rename(WORK / "base")
    if not (WORK / "adapter").exists():
        write_adapter(WORK / "adapter", shape_20b(), size=0.01, target_modules=ATTENTION, target_parameters=EXPERTS)


def merge(with_peft: bool) -> dict[str, Any]:  # Any: JSON values
    """Time every way on the files that the page cache holds, each in a process of its own, and fsync in the end."""
    from tests.bench.bench_merge import run_way

    make_inputs()
    subprocess.run(["sync"], check=True)
    line: dict[str, Any] = {"name": "merge-20b", "cpus": os.cpu_count()}
    line["gb"] = sum(path.stat().st_size for path in (WORK / "base").glob("*.safetensors")) / 1e9
    ways = ["cp", "ours", "cp", *(["peft"] if with_peft else [])]
    for number, way in enumerate(ways):
        found = run_way(way, WORK, "bfloat16")
        line[f"{way}_{number}"] = {name: round(value, 1) for name, value in found.items()}
        if way != "ours":
            shutil.rmtree(WORK / way)
        sys.stderr.write(json.dumps(line) + "\n")
    line["ours_share_of_cp_pct"] = round(100 * (line["cp_0"]["s"] + line["cp_2"]["s"]) / 2 / line["ours_1"]["s"])
    return line


@contextmanager
def running(argv: list[str], variables: dict[str, str], url: str, log: Path) -> Iterator[float]:
    """Run a server; yields the seconds until it is ready. It and its children are gone afterwards."""
    begun = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, env=os.environ | variables, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"{argv} ended: {log.read_text()[-3000:]}")
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.25)
        yield time.perf_counter() - begun
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


async def ask_all(url: str, count: int) -> dict[str, float]:
    """Send that many requests at once; return output tokens per second and times to the first token."""
    import aiohttp

    async def ask(session: Any) -> float:  # Any: aiohttp's session
        prompt = [random.randrange(1000, 199_000) for _ in range(PROMPT_TOKENS)]
        body = {"model": "bench", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "stream": True}
        first, begun = 0.0, time.perf_counter()
        async with session.post(f"{url}/v1/completions", json=body | {"temperature": 1.0}) as reply:
            if reply.status != 200:
                raise SystemExit(f"{reply.status}: {await reply.text()}")
            async for piece in reply.content.iter_any():
                if not first and piece.strip():
                    first = time.perf_counter() - begun
        return first

    begun = time.perf_counter()
    limits = {"connector": aiohttp.TCPConnector(limit=0), "timeout": aiohttp.ClientTimeout(total=300)}
    async with aiohttp.ClientSession(**limits) as session:
        firsts = await asyncio.gather(*(ask(session) for _ in range(count)))
    seconds = time.perf_counter() - begun
    shown = {"first_token_s_median": statistics.median(firsts), "first_token_s_max": max(firsts), "s": seconds}
    return {name: round(value, 4) for name, value in shown.items()} | {"tokens_per_s": round(count * 256 / seconds)}


def measure(url: str) -> dict[str, Any]:  # Any: JSON values
    """Ask with more and more requests at once; each number after one run that warms up."""
    asyncio.run(ask_all(url, 2))
    found: dict[str, Any] = {}
    for count in CONCURRENT:
        rounds = [asyncio.run(ask_all(url, count)) for _ in range(3 if count == 1 else 2)]
        found[str(count)] = max(rounds, key=lambda each: each["tokens_per_s"])
    return found


def serve() -> dict[str, Any]:  # Any: JSON values
    """Start vLLM on the merged folder with the product's own command, and the gateway before it."""
    from tasks.serve.command import gateway_command, vllm_command
    from tasks.specs import ServeSpec

    model, tokenizer = WORK / "ours/model", Path(os.environ["TOKENIZER_DIR"])
    for path in tokenizer.iterdir():
        shutil.copy(path, model / path.name)
    python = os.environ.get("TATARA_VLLM_PYTHON", sys.executable)
    spec = ServeSpec(
        vllm_port=VLLM_PORT, gateway_port=GATEWAY_PORT, served_model_name="bench", max_model_len=4096, max_num_seqs=256
    )
    (WORK / "scratch/temporary").mkdir(parents=True, exist_ok=True)
    scratch = str(WORK / "scratch")
    argv, extra = vllm_command(spec, str(model), on_gpu=True, python=python, scratch=scratch, cache=f"{scratch}/cache")
    if "BENCH_WITHOUT" in os.environ:  # an option (and its value) that an older vLLM does not know
        at = argv.index(os.environ["BENCH_WITHOUT"])
        del argv[at : at + 2]
    extra |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "TIKTOKEN_ENCODINGS_BASE": str(tokenizer)}
    vllm_url, gateway_url = (f"http://127.0.0.1:{port}" for port in (VLLM_PORT, GATEWAY_PORT))
    line: dict[str, Any] = {"name": "serve-20b", "prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS}
    with running(argv, extra, vllm_url, WORK / "vllm.log") as start_s:
        line |= {"vllm_start_s": round(start_s, 1), "vllm": measure(vllm_url)}
        sys.stderr.write(json.dumps(line) + "\n")
        chat = f"{vllm_url}/v1/chat/completions"
        argv, extra = gateway_command(spec, python=sys.executable, vllm_url=chat, variables={})
        queue = {"FILE_QUEUE_PATH": str(WORK / "traces.jsonl"), "GATEWAY_MAX_CONCURRENT": "512"}
        with running(argv, extra | queue, gateway_url, WORK / "gateway.log") as start_s:
            line |= {"gateway_start_s": round(start_s, 1), "gateway": measure(gateway_url)}
    return line


def main() -> None:
    """Measure one of the two, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["merge", "serve"])
    parser.add_argument("--peft", action="store_true", help="also PEFT's merge_and_unload, some minutes")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    line = merge(options.peft) if options.what == "merge" else serve()
    line["python"] = platform.python_version()
    sys.stdout.write(json.dumps(line) + "\n")
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / f"{line['name']}.json").write_text(json.dumps(line, indent=1) + "\n")


if __name__ == "__main__":
    main()
