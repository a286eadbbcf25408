"""What this machine is and has: GPU, Python, disk, system libraries, wheel folders of its pip.

Ring: edge; standard library only, it runs before anything is installed.  Units: bytes.
"""

import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

# what the locked releases have wheels for
NEWEST = ((3, 14), "torch 2.13.0 has no wheel for another")
NEWEST_ON_GPU = ((3, 12), "cuda-python 12.6, which vLLM needs on a GPU host, has no wheel for another")


class SetupError(RuntimeError):
    """An environment can't be made; the message says why and what to do."""


@functools.cache
def has_nvidia_gpu() -> bool:
    """Say whether nvidia-smi is there and lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def check_python_and_disk(folder: Path, needed_bytes: int, *, on_gpu: bool = False) -> None:
    """Raise SetupError when the running Python is too old or new, or the disk too full."""
    newest, why = NEWEST_ON_GPU if on_gpu else NEWEST
    if not (3, 11) <= sys.version_info[:2] <= newest:
        raise SetupError(
            f"Python {platform.python_version()} runs this but 3.11 to 3.{newest[1]} is needed ({why}): "
            "call it with one of them, for example `make PYTHON=python3.11 demo`"
        )
    free = shutil.disk_usage(folder.parent).free
    if free < needed_bytes:
        raise SetupError(
            f"{folder.name} needs about {needed_bytes / 1e9:.0f} GB below "
            f"{folder.parent} but {free / 1e9:.1f} GB are free: free some space"
        )


def check_own_folder(folder: Path) -> None:
    """Raise SetupError for a symbolic link: through it another checkout's environment would be emptied."""
    if folder.is_symlink():
        raise SetupError(
            f"{folder} is a symbolic link to {folder.readlink()}, whose target would be emptied and made again: "
            "remove the link to get an environment of its own here, or run this in the checkout that owns it"
        )


def check_vllm_cpu_host() -> None:
    """Raise SetupError when vLLM's CPU build could not run here."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SetupError(f"vLLM's CPU build is locked for Linux x86_64; this is {sys.platform} {platform.machine()}")
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError as error:
        raise SetupError("vLLM on CPU needs libnuma.so.1: `apt-get install libnuma1` (or `numactl-libs`)") from error
    if shutil.which("lscpu") is None:
        raise SetupError("vLLM on CPU asks lscpu for the cores: `apt-get install util-linux`")


@functools.cache
def read_pip_settings() -> dict[str, str]:
    """Return what pip is set up with (index-url, find-links, cert ...); PIP_* variables win over files."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # empty without pip
    settings: dict[str, str] = {}
    for name, value in re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", answer, re.MULTILINE):
        settings[name] = value
    for name in ("index-url", "find-links", "cert"):
        value = os.environ.get(f"PIP_{name.replace('-', '_').upper()}")
        if value:
            settings[name] = value
    return settings


def list_wheel_folders() -> list[Path]:
    """Return the local folders that pip's configuration names as find-links."""
    words = read_pip_settings().get("find-links", "").replace("\\n", " ").split()
    folders = (Path(word.removeprefix("file://")) for word in words)
    return [folder for folder in folders if folder.is_dir()]


def uv_variables() -> dict[str, str]:
    """Return our environment with pip's index and certificate handed on to uv, which reads neither."""
    variables = dict(os.environ)
    for pip_name, uv_name in [("index-url", "UV_DEFAULT_INDEX"), ("cert", "SSL_CERT_FILE")]:
        if pip_name in read_pip_settings():
            variables.setdefault(uv_name, read_pip_settings()[pip_name])
    variables.setdefault("UV_HTTP_TIMEOUT", "180")
    variables.pop("VIRTUAL_ENV", None)
    return variables


def find_cpu_torch(folders: list[Path], version: str) -> Path | None:
    """Return torch's +cpu wheel for the running Python and machine, if a folder holds one."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    pattern = f"torch-{version}+cpu-{tag}-{tag}-*{platform.machine()}.whl"
    return next((wheel for folder in folders for wheel in sorted(folder.glob(pattern))), None)
