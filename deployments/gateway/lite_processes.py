"""The lite model in processes of the gateway's own, when LITE_MODEL is a folder or a Hub id.

    LITE_MODEL -> LiteProcesses -> `python -m deployments.lite` on a Unix socket each -> Upstream "lite"

torch is loaded there, never here. Until a process has loaded its model it counts as down ("lite-loading"),
so the gateway answers at once; whoever finds all places taken goes to vLLM ("lite-busy").

Ring: edge (processes, disk).  Units: seconds.
"""

import asyncio
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from deployments.gateway.child import Child
from deployments.gateway.settings import Settings
from deployments.gateway.upstream import Upstream
from tasks.errors import SpecError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _STOP_S = 1.0, 60.0, 5.0
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}(@[\w./-]{1,100})?")
_NOT_FOR_IT = ("VLLM_API_KEY", "LITE_API_KEY", "REDIS_URL", "WANDB_API_KEY", "GATEWAY_KEYS_FILE")


class LiteProcesses:
    """Keeps the processes running; `upstreams` are how they are asked."""

    def __init__(self, settings: Settings) -> None:
        self._source = _source_of(settings.lite_model)
        self._folder = Path(tempfile.mkdtemp(prefix="tatara-lite-"))  # only we may look into it
        name = settings.lite_model_name or Path(self._source.partition("@")[0]).name
        count = settings.lite_processes
        names = ["lite"] if count == 1 else [f"lite-{number}" for number in range(1, count + 1)]
        self.upstreams = [self._upstream(each, name, settings) for each in names]
        self._children = [self._child(upstream, name, settings) for upstream in self.upstreams]

    def start(self) -> list[asyncio.Task[None]]:
        """Start them in the running loop."""
        return [asyncio.create_task(child.run_forever()) for child in self._children]

    def counts(self) -> list[dict[str, str | int]]:
        """Return what /health shows of them."""
        return [
            {"name": upstream.name, "state": upstream.state, "restarts": child.num_restarts}
            for upstream, child in zip(self.upstreams, self._children, strict=True)
        ]

    async def stop(self) -> None:
        """End them all."""
        await asyncio.gather(*(child.stop(_STOP_S) for child in self._children))
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    def _upstream(self, name: str, model: str, settings: Settings) -> Upstream:
        upstream = Upstream(name, f"unix:{self._folder / name}", settings, is_lite=True)
        upstream.first_model = model
        upstream.places = 1 + settings.lite_waiting
        upstream.note_loading()
        return upstream

    def _child(self, upstream: Upstream, model: str, settings: Settings) -> Child:
        threads = max(1, (os.cpu_count() or 1) // settings.lite_processes)
        argv = (
            *(sys.executable, "-m", "deployments.lite", self._source, "--name", model),
            *("--socket", str(self._folder / upstream.name), "--room", str(settings.lite_waiting)),
            *("--threads", str(threads)),
        )
        variables = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_IT}
        child = Child(upstream.name, argv, variables, pause_s=_FIRST_PAUSE_S, longest_pause_s=_LONGEST_PAUSE_S)
        child.on_start, child.on_end = upstream.note_loading, upstream.note_ended
        return child


def _source_of(model: str) -> str:
    """Return the folder, absolute, or the Hub id. Raises SpecError when it is neither or could not be loaded here."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SpecError(f"LITE_MODEL={model!r} is a folder without config.json: name one in Hugging Face's layout")
        source = str(folder.absolute())
    elif _HUB_ID.fullmatch(model) and not model.startswith((".", "/", "~")):
        source = model
    else:
        raise SpecError(
            f"LITE_MODEL={model!r} is no folder that is there: name a folder, a Hub id (owner/name or "
            "owner/name@revision), or the URL of an OpenAI-compatible server"
        )
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise SpecError(
            f"LITE_MODEL={model!r} needs {' and '.join(missing)} in the gateway's environment: install tatara[train], "
            "or give the URL of an OpenAI-compatible server"
        )
    return source
