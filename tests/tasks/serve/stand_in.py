"""A small server in vLLM's place (or the gateway's), and clients of the gateway: what the tests of serving share."""

import json
import os
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from tasks import processes
from tasks.serve import services
from tasks.serve.services import ServiceSettings

FAKE = """\
    #!{python} -E
    # Answers as vLLM when called with its argv, as the gateway otherwise. How it fails: FAKE_MODE at its start, or
    # mode.json in the model's folder, which may change while it runs.
    import http.server, json, os, pathlib, signal, subprocess, sys, time, urllib.request
    mode, is_vllm = os.environ.get("FAKE_MODE", ""), "serve" in sys.argv
    def value(flag):
        return sys.argv[sys.argv.index(flag) + 1]
    folder = pathlib.Path(sys.argv[sys.argv.index("serve") + 1]) if is_vllm else None
    def now():
        path = folder / "mode.json"
        return json.loads(path.read_text()) if path.exists() else {{}}
    if is_vllm and mode == "die":
        print("cannot load", os.environ.get("HF_TOKEN", ""), flush=True)
        sys.exit(7)
    if is_vllm and not now().get("starts", True):
        sys.exit("no such architecture")
    if is_vllm and mode == "hang":
        time.sleep(600)
    if is_vllm and mode == "child":
        subprocess.Popen(["sleep", "600"], start_new_session=True)
    if is_vllm and mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *_):
            pass
        def say(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        def do_GET(self):
            if not is_vllm:
                base = os.environ["VLLM_URL"].rpartition("/v1/")[0]
                self.say(200, {{"gateway": "ok", "vllm": urllib.request.urlopen(base + "/health").status == 200}})
            elif self.path == "/v1/models":
                name = "other" if mode == "wrong-name" else value("--served-model-name")
                self.say(200, {{"data": [{{"id": name}}]}})
            else:
                self.say(503 if now().get("is_ill") else 200, {{}})
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            how = now()
            time.sleep(how.get("delay_s", 0))
            if how.get("dies"):
                os._exit(1)
            message = {{"role": "assistant", "content": folder.name}}
            choice = {{"index": 0, "finish_reason": "stop", "message": message}}
            self.say(500 if how.get("fails") else 200, {{"choices": [choice], "model": folder.name}})
    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128
    Server(("127.0.0.1", int(value("--port") if is_vllm else os.environ["LITE_GATEWAY_PORT"])), Handler).serve_forever()
"""


def make_python(folder: Path) -> Path:
    """Make an environment of the CPU build whose python is the stand-in; return that python."""
    python = folder / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(textwrap.dedent(FAKE).format(python=sys.executable))
    python.chmod(0o755)
    (folder / "env/lib/python3.11/site-packages/vllm-0+cpu.dist-info").mkdir(parents=True)
    return python


def make_model(folder: Path, weights: str = "", **mode: object) -> Path:
    """Make what passes for a model; `mode` says how its server fails."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    set_mode(folder, **mode)
    if weights:
        (folder / "model.safetensors").write_text(weights)
    return folder


def set_mode(model: str | Path, **mode: object) -> None:
    """Change how the model's server fails; it looks at each request. No part of the fingerprint changes with it."""
    text = json.dumps(mode)
    assert len(text) <= 100, text
    path = Path(model) / "mode.json"
    stat = path.stat() if path.exists() else None
    path.write_text(text.ljust(100))
    if stat:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def running(settings: ServiceSettings) -> set[str]:
    """Return which services run."""
    return {name for name in ("vllm", "vllm-b", "gateway") if processes.find_alive(settings.identity_file(name))}


def beside(settings: ServiceSettings) -> str:
    """Return how the vLLM beside the one that serves is, as `tatara services status` says."""
    candidate = services.status(settings).candidate
    return candidate.state if candidate else ""


def ask(settings: ServiceSettings) -> tuple[int, str, str]:
    """Ask the gateway; return status, who answered, and the model digest that the answer's header says."""
    url = f"http://127.0.0.1:{settings.spec.gateway_port}/v1/chat/completions"
    body = json.dumps({"model": "gpt-oss-20b", "messages": [{"role": "user", "content": "?"}]}).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)["model"], reply.headers["x-tatara-model-digest"] or ""
    except urllib.error.HTTPError as error:
        return error.code, "", error.headers["x-tatara-model-digest"] or ""


class Clients:
    """Some who keep asking while the body runs, and what each was told."""

    def __init__(self, settings: ServiceSettings, count: int = 3) -> None:
        self.settings, self.told, self._stop = settings, Counter[Any](), threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(count)]

    def _work(self) -> None:
        while not self._stop.is_set():
            self.told[ask(self.settings)] += 1

    def __enter__(self) -> Counter[Any]:
        for thread in self._threads:
            thread.start()
        return self.told

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
