"""What decides which services run: the model, the knobs, and where this machine keeps things.

    ServiceSettings -> preflight.py (may it start?) -> services.py (start, stop, look)

Ring: edge (reads the environment, looks at the disk).
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from tasks.serve.command import reach
from tasks.specs import ServeSpec, change

ROOT = Path(__file__).resolve().parents[2]
# what publish adds
BESIDE_MODEL = frozenset({"README.md", ".gitattributes", "recipe.json", "loss_curve.png", "reward_curve.png"})
NO_OVERRIDES: Mapping[str, str] = {}
SERVICES = ("vllm", "gateway")
RUN_ID = "TATARA_RUN_ID"  # among the ids: the flow run that put the model there
SLOTS = ("vllm", "vllm-b")  # a promotion starts the new vLLM in the one that does not serve


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """Everything that decides what runs. The token goes to vLLM only, for Hub models only."""

    model: str
    spec: ServeSpec = field(default_factory=ServeSpec)
    home: Path = field(default_factory=lambda: Path(os.environ.get("TATARA_HOME") or ".tatara").resolve())
    hf_token: str = field(default="", repr=False)
    vllm_url: str = ""
    variables: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    vllm_python: Path = field(
        default_factory=lambda: Path(os.environ.get("TATARA_VLLM_PYTHON") or ROOT / ".venv-vllm/bin/python")
    )
    gateway_python: Path = Path(sys.executable)
    ids: Mapping[str, str] = field(default_factory=dict)  # TATARA_*: what the gateway's answers lead back to
    slot: str = SLOTS[0]

    @property
    def folder(self) -> Path:
        """Return the folder of records, logs and vLLM's caches."""
        return self.home / "services"

    def identity_file(self, name: str) -> Path:
        """Return the file that says which process is the service."""
        return self.folder / f"{name}.json"

    def state_file(self, name: str) -> Path:
        """Return the file in which a service's supervisor says what became of it."""
        return self.folder / f"{name}.state"

    def log(self, name: str) -> Path:
        """Return the file that takes the service's stdout and stderr."""
        return self.folder / f"{name}.log"

    @property
    def vllm_port(self) -> int:
        """Return the port of the vLLM in this slot."""
        return self.spec.vllm_port if self.slot == SLOTS[0] else self.spec.port_beside

    @property
    def other_slot(self) -> str:
        """Return the slot beside this one."""
        return SLOTS[1 - SLOTS.index(self.slot)]

    @property
    def upstreams_file(self) -> Path:
        """Return the file that tells the gateway who gets which share."""
        return self.folder / "upstreams.json"

    @property
    def vacancy(self) -> Path:
        """Return the file that is there while our vLLM was stopped to make way and nothing has taken its place."""
        return self.folder / "vacant.json"

    @property
    def model_folder(self) -> Path | None:
        """Return the local folder of the model; None when `model` is a Hub id."""
        path = Path(self.model).expanduser()
        is_hub_id = self.model.count("/") == 1 and not self.model.startswith((".", "/", "~")) and not path.exists()
        return None if is_hub_id else path.resolve()

    @property
    def uses_own_vllm(self) -> bool:
        """Say whether the gateway is to talk to the vLLM that we start, and not to one elsewhere."""
        if not self.vllm_url:
            return True
        parts = urlsplit(self.vllm_url)
        ports = (self.spec.vllm_port, self.spec.port_beside)
        return reach(parts.hostname or "") == reach(self.spec.host) and parts.port in ports

    @property
    def scratch(self) -> Path:
        """Return vLLM's folder for sockets, short enough for a Unix socket: below home, else below /tmp."""
        folder = self.folder / self.slot
        if len(str(folder)) <= 60:
            return folder
        return Path(tempfile.gettempdir()) / f"tatara-{os.getuid()}-{digest_of(str(folder))[:12]}"

    @property
    def cache(self) -> Path:
        """Return where vLLM keeps what it compiles and looks up about kinds of models.

        In its environment when that can be written, so a new home or slot does not do it all again (12 CPU seconds of
        a start on a CPU, the compiled graphs on a GPU) and a new environment does; else in scratch.
        """
        environment = self.vllm_python.parent.parent
        if (environment / "pyvenv.cfg").is_file() and os.access(environment, os.W_OK):
            return environment / "cache"
        return self.scratch / "cache"


def service_settings(model: str, spec: ServeSpec, home: Path, host: Mapping[str, str]) -> ServiceSettings:
    """Return the settings of a recipe on one machine.

    Args:
        model: folder or Hub id.
        spec: ports, name, lengths.
        home: the store's root.
        host: HOST and TATARA_VLLM_PYTHON of the machine, when they differ from the recipe's.
    """
    if host.get("HOST"):
        spec = change(spec, {"host": host["HOST"]})
    settings = ServiceSettings(model=model, spec=spec, home=home, variables=os.environ)
    if host.get("TATARA_VLLM_PYTHON"):
        settings = replace(settings, vllm_python=Path(host["TATARA_VLLM_PYTHON"]))
    return settings


def digest_of(value: object) -> str:
    """Return the sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
