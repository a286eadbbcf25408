"""A model that took the place of another before it passed everything: whose run did that, and what was there before.

    begin() -> <services>/trial.json -> passed: end()
                                     -> failed: handover.py starts what the file says was there before

What was there before need not be the last verified model: a person may have started it.

Ring: edge (disk, processes).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tasks import files, processes
from tasks.errors import CorruptError, TransientError
from tasks.serve.fingerprints import fingerprint_model
from tasks.serve.looking import follow, is_alive, this_process
from tasks.serve.settings import RUN_ID, ServiceSettings
from tasks.serve.traffic import read_shares


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """`before` is the note of the service that was replaced, with its ids; empty: nothing was served."""

    model: str
    run: str
    promoter: str
    before: dict[str, str] = field(default_factory=dict)


def begin(settings: ServiceSettings) -> None:
    """Note that the settings' model is about to take the place of what serves.

    Nothing is noted of a model that serves already: it takes nobody's place. A model that is itself still on trial,
    for its run was killed, is nothing to go back to: what was there before it stays noted.
    """
    now = follow(settings)
    running, earlier = processes.find_alive(now.identity_file(now.slot)), read(settings.home)
    before = describe(settings.home, running.note) if running else {}
    if earlier and before.get("model", earlier.model) == earlier.model:
        before = earlier.before
    elif before.get("model") == settings.model and before.get("fingerprint") == fingerprint_model(settings):
        return
    trial = Trial(model=settings.model, run=settings.ids.get(RUN_ID, ""), promoter=this_process(), before=before)
    files.write_json(_path(settings.home), asdict(trial))


def read(home: Path) -> Trial | None:
    """Return the trial that runs, or that a killed run left; None without one that can be read."""
    try:
        return Trial(**files.read_json(_path(home)))
    except (OSError, CorruptError, TypeError):  # none, torn, or of another version
        return None


def end(home: Path) -> None:
    """Forget the trial: it was passed, or what was there before serves again."""
    _path(home).unlink(missing_ok=True)


def require_no_other(settings: ServiceSettings) -> None:
    """Raise TransientError while another run's model is on trial: two promotions would end each other's models."""
    trial = read(settings.home)
    if trial is None or trial.run == settings.ids.get(RUN_ID, "") or trial.promoter == this_process():
        return
    if is_alive(trial.promoter):
        raise TransientError(
            f"a promotion (pid {trial.promoter.partition('@')[0]}) tries {trial.model} in front of clients: wait until "
            "it ends, or cancel its flow run"
        )


def describe(home: Path, note: dict[str, str]) -> dict[str, str]:
    """Return all that starting this service again needs: its note, and the ids that its answers lead back to."""
    shares = read_shares(ServiceSettings(model="", home=home).folder)
    return {**note, "ids": json.dumps(dict(shares[0].ids)) if shares else "{}"}


def _path(home: Path) -> Path:
    return ServiceSettings(model="", home=home).folder / "trial.json"
