"""What a running service was made of: its model's files, its code, its packages.

A service that runs is kept only while all of these are what they were.

Ring: edge (disk; reads no weights).
"""

from pathlib import Path

from tasks import files
from tasks.serve.settings import BESIDE_MODEL, ROOT, ServiceSettings, digest_of

_GATEWAY = (  # all that it loads of ours, what its lite processes are and what its direct drain does
    *("deployments/gateway", "deployments/lite", "deployments/traces.py", "tasks/traces"),
    *("tasks/environment.py", "tasks/errors.py", "tasks/files.py", "tasks/specs.py"),
)


def fingerprint_model(settings: ServiceSettings) -> str:
    """Return a digest of names, sizes and times of the model's files; of its id for a Hub model. Reads no weights.

    What publish adds counts for nothing: no server reads it, and publishing the same weights anew (another tag, a
    newer card) must not make the model that serves another one.
    """
    folder = settings.model_folder
    if folder is None:
        return settings.model
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in BESIDE_MODEL]
    stats = [(path.name, path.stat()) for path in paths]
    return digest_of([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def fingerprint_gateway(root: Path = ROOT) -> str:
    """Return a digest of the gateway's own code. Cost: some forty small files are read."""
    paths = [path for name in _GATEWAY for path in sorted((root / name).rglob("*.py")) or [root / name]]
    return digest_of([(str(path.relative_to(root)), files.digest(path)) for path in paths])


def fingerprint_environment(python: Path) -> str:
    """Return what tells an environment from the same folder made anew: its stamp, else the packages in it."""
    stamp = python.parent.parent / "tatara.json"
    if stamp.is_file():
        return files.digest(stamp)
    return digest_of(sorted(path.name for path in (python.parent.parent / "lib").glob("python3*/site-packages/*-info")))
