"""Make a Python environment from its lock file: `python3 deployments/environments.py main|vllm|weave|ppo`.

    bare Python -> uv -> .venv or .venv-NAME -> torch for this host -> the lock -> .pyc -> stamp

`main` holds the flows, the gateway and the trainer; `vllm` holds vLLM, whose pins contradict
Prefect's; `weave` holds Weave's trace server, for its contract tests only; `ppo` holds verl and Ray.
The stamp is written last, so a killed run is redone and a finished one returns at once.

Ring: edge; standard library only, it runs before anything is installed.  Units: bytes, seconds.
Trap: a CPU host must get torch's +cpu wheel (190 MB) and not PyPI's CUDA build (4.5 GB); wheel
      folders that pip is told about (find-links) are tried first, because uv does not read them.
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.version_info < (3, 11):  # noqa: UP036 - before our own imports: older Pythons can't read them
    sys.exit(f"error: Python {platform.python_version()} is too old: call this with 3.11 to 3.14")
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # called as a script: our folder would offer its services.py as a top-level module

from deployments.host import (  # noqa: E402 - after the path is right
    SetupError,
    check_own_folder,
    check_python_and_disk,
    check_vllm_cpu_host,
    find_cpu_torch,
    has_nvidia_gpu,
    list_wheel_folders,
    uv_variables,
)

UV_VERSION = "0.13.8"
TORCH_VERSION = "2.13.0"
VLLM_VERSION = "0.32.0"
RECIPE = 1  # raise it when the same lock must be installed anew

_logger = logging.getLogger("environments")
_LOCKS = {  # the lock, and the bytes needed with uv's cache beside it; keys: environment, on a GPU host
    ("main", False): ("main.txt", 4 * 10**9),
    ("main", True): ("main.txt", 12 * 10**9),
    ("vllm", False): ("vllm-cpu.txt", 4 * 10**9),
    ("vllm", True): ("vllm-cuda.txt", 20 * 10**9),
    ("weave", False): ("weave.txt", 2 * 10**9),
    ("weave", True): ("weave.txt", 2 * 10**9),
    ("ppo", False): ("ppo-cpu.txt", 4 * 10**9),
    ("ppo", True): ("ppo-cuda.txt", 24 * 10**9),
}
_NOT_COMPILED = r"/(tests?|testing)/|/moto/|/transformers/models/(?!(auto|gpt_oss|llama|qwen[23]\w*)/)\w+/"
_CAUSES = [
    (
        r"dns error|failed to fetch|error sending request|connection refused|timed? ?out|unreachable",
        "the package index did not answer: check the network or the proxy variables (HTTPS_PROXY), then run this again",
    ),
    (r"no space left", "the disk is full: free some space (`uv cache clean` empties uv's cache), then run this again"),
    (r"hash mismatch", "a package differs from the lock file: a mirror changed it; do not install it"),
    (
        r"no (matching distribution|solution found)|no wheels? with a matching|requires-python",
        "this Python or platform has no such package: use CPython 3.11 on Linux x86_64, for which the locks are made",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What one environment is made of on this host; the stamp's presence means that it is whole."""

    name: str
    folder: Path
    lock: Path
    needed_bytes: int
    on_gpu: bool

    @property
    def python(self) -> Path:  # noqa: D102
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:  # noqa: D102
        return self.folder / "tatara.json"


def main(arguments: list[str]) -> int:
    """Make the named environments; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        for name in arguments or ["main"]:
            make_environment(describe_environment(name))
    except SetupError as error:
        _logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        _logger.error("stopped; run the same command again to go on")
        return 130
    return 0


def describe_environment(name: str, *, root: Path = ROOT) -> Environment:
    """Return what environment `name` needs here. Raises SetupError for an unknown name."""
    on_gpu = has_nvidia_gpu()
    if (name, on_gpu) not in _LOCKS:
        raise SetupError(f"there is no environment {name!r}: choose main, vllm, weave or ppo")
    lock, needed = _LOCKS[name, on_gpu]
    folder = root / (".venv" if name == "main" else f".venv-{name}")
    return Environment(name=name, folder=folder, lock=root / "locks" / lock, needed_bytes=needed, on_gpu=on_gpu)


def make_environment(environment: Environment) -> None:
    """Make the environment unless its stamp says that it is whole. Raises SetupError."""
    if is_whole(environment):
        return
    folder = environment.folder
    check_own_folder(folder)
    check_python_and_disk(folder, environment.needed_bytes, on_gpu=environment.on_gpu)
    if environment.name == "vllm" and not environment.on_gpu:
        check_vllm_cpu_host()
    lock_path = folder.parent / ".tatara" / f"{folder.name.lstrip('.')}.lock"
    lock_path.parent.mkdir(exist_ok=True)
    with lock_path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two `make` at once: the second finds the stamp
        os.set_inheritable(lock.fileno(), True)  # when we are killed, a uv that still writes keeps the lock
        if is_whole(environment):
            return
        begin = time.monotonic()
        uv = find_uv(folder.parent)
        accelerator = "CUDA" if environment.on_gpu else "CPU"
        steps: list[tuple[str, Callable[[], None]]] = [
            (f"new {folder.name} with Python {platform.python_version()}", lambda: create_folder(environment, uv)),
            (f"torch {TORCH_VERSION} ({accelerator})", lambda: add_torch(environment, uv)),
            (f"packages of {environment.lock.name}", lambda: add_locked(environment, uv)),
            ("byte code", lambda: compile_packages(environment)),
        ]
        if environment.name == "weave":
            del steps[1]  # no torch in it
        for number, (title, step) in enumerate(steps, start=1):
            started = time.monotonic()
            step()
            took = time.monotonic() - started
            _logger.info("[%s %d/%d] %s: %.1f s", environment.name, number, len(steps), title, took)
        write_stamp(environment, time.monotonic() - begin)


def fingerprint(environment: Environment) -> str:
    """Return the digest of all that decides what gets installed."""
    parts = [environment.lock.read_bytes(), platform.python_version().encode(), str(environment.folder).encode()]
    parts += [TORCH_VERSION.encode(), str(environment.on_gpu).encode(), str(RECIPE).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def is_whole(environment: Environment) -> bool:
    """Say whether the environment was finished from the same lock, Python and accelerator."""
    if not environment.lock.is_file():
        raise SetupError(f"{environment.lock} is missing: restore it with `git checkout -- locks`")
    try:
        stamp = json.loads(environment.stamp.read_text())
    except (OSError, ValueError):
        return False
    return stamp.get("fingerprint") == fingerprint(environment) and environment.python.exists()


def find_uv(root: Path) -> Path:
    """Return a uv of at least our minor version from PATH, else put one into `.venv-uv`."""
    wanted = tuple(int(part) for part in UV_VERSION.split(".")[:2])
    for candidate in (shutil.which("uv"), root / ".venv-uv/bin/uv"):
        if candidate is None or not Path(candidate).exists():
            continue
        answer = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"(\d+)\.(\d+)", answer)
        if found and (int(found[1]), int(found[2])) >= wanted:
            return Path(candidate)
    folder = root / ".venv-uv"
    _logger.info("uv %s into %s ...", UV_VERSION, folder.name)
    run(
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        "the venv module (Debian: `apt-get install python3-venv`)",
    )
    run([str(folder / "bin/python"), "-m", "pip", "install", "-q", f"uv=={UV_VERSION}"], "pip installing uv")
    return folder / "bin" / "uv"


def create_folder(environment: Environment, uv: Path) -> None:
    """Make an empty environment, in place of an unfinished or outdated one."""
    interpreter = getattr(sys, "_base_executable", None) or sys.executable  # not a venv that may be removed
    run(
        [str(uv), "venv", "-q", "--clear", "--python", interpreter, str(environment.folder)],
        "uv making the environment",
    )


def add_torch(environment: Environment, uv: Path) -> None:
    """Install the torch build that this host can use; for vLLM and verl on CUDA the lock holds it."""
    if environment.on_gpu and environment.name in {"vllm", "ppo"}:
        return
    install = [str(uv), "pip", "install", "--python", str(environment.python)]
    if environment.on_gpu:
        run([*install, f"torch=={TORCH_VERSION}"], "uv installing torch")
        return
    wheel = find_cpu_torch(list_wheel_folders(), TORCH_VERSION)
    if wheel is None:
        run([*install, "--no-deps", "--torch-backend", "cpu", f"torch=={TORCH_VERSION}"], "uv installing torch")
    else:
        run([*install, "--no-deps", str(wheel)], "uv installing torch")


def add_locked(environment: Environment, uv: Path) -> None:
    """Install exactly what the lock names, checked by hash; then what no index has."""
    install = [str(uv), "pip", "install", "--python", str(environment.python), "--no-deps", "--require-hashes"]
    run([*install, "-r", str(environment.lock)], f"uv installing {environment.lock.name}")
    if environment.name == "main":
        register_project(environment)
    elif environment.name == "vllm" and not environment.on_gpu:
        register_cpu_vllm(environment)


def register_project(environment: Environment) -> None:
    """Put the repository on the path and a `tatara` command into bin.

    A .pth file and not an editable install: no build, no network, no stale file list.
    """
    (find_packages(environment) / "tatara.pth").write_text(f"{ROOT}\n")
    command = environment.folder / "bin" / "tatara"
    command.write_text(f"#!{environment.python}\nimport sys\n\nfrom deployments.cli import main\n\nsys.exit(main())\n")
    command.chmod(0o755)


def register_cpu_vllm(environment: Environment) -> None:
    """Let `vllm` find its own version: the CPU republication is named vllm-cpu, the code asks for vllm.

    vLLM picks the CPU platform because the version that it finds holds the word "cpu".
    """
    folder = find_packages(environment) / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")
    (folder / "INSTALLER").write_text("tatara\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))


def find_packages(environment: Environment) -> Path:
    """Return the environment's site-packages."""
    return next((environment.folder / "lib").glob("python3*/site-packages"))


def compile_packages(environment: Environment) -> None:
    """Write the .pyc files that uv does not; it halves every start.

    Test suites and most of transformers' model zoo are left out: a third of the work, never
    imported. Files that don't compile are templates; the exit status says nothing.
    """
    command = [str(environment.python), "-m", "compileall", "-q", "-j", "0", "-x", _NOT_COMPILED]
    subprocess.run([*command, str(find_packages(environment))], capture_output=True, check=False, close_fds=False)


def write_stamp(environment: Environment, seconds: float) -> None:
    """Mark the environment as whole."""
    content = {"fingerprint": fingerprint(environment), "lock": environment.lock.name, "seconds": round(seconds, 1)}
    aside = environment.stamp.with_suffix(".tmp")
    with aside.open("w") as handle:
        json.dump(content, handle)
        handle.flush()
        os.fsync(handle.fileno())
    aside.replace(environment.stamp)
    _logger.info("environment %s is ready after %.1f s", environment.name, seconds)


def run(command: list[str], what: str) -> None:
    """Run a command, pass its messages on, and explain its failure. Raises SetupError."""
    tail: list[str] = []
    try:
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=uv_variables(), close_fds=False
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if not line.startswith((" + ", " - ", " ~ ", "   Downloaded")):  # one line per package is too much
                    sys.stderr.write(f"  {line}")
                tail = [*tail[-19:], line.rstrip()]
    except OSError as error:
        raise SetupError(f"{what} could not start: {error}") from error
    if process.returncode == 0:
        return
    text = "\n".join(tail)
    hint = next((hint for pattern, hint in _CAUSES if re.search(pattern, text, re.IGNORECASE)), "see the lines above")
    raise SetupError(f"{what} failed with exit status {process.returncode}: {hint}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
