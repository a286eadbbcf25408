"""That our vLLM was stopped to make way, and by whom: the gap that `handover.serve_again` fills when a run fails.

Ring: edge (disk).
"""

from tasks import files, processes
from tasks.errors import CorruptError
from tasks.serve.looking import this_process
from tasks.serve.settings import ServiceSettings


def note(settings: ServiceSettings, running: processes.Identity) -> None:
    """Note that this process is about to stop it."""
    files.write_json(settings.vacancy, {**running.note, "vacated_by": this_process()})


def made_by(settings: ServiceSettings) -> str:
    """Return who noted it, as `looking.this_process` names processes; empty when that can't be read."""
    try:
        return str(files.read_json(settings.vacancy)["vacated_by"])
    except (OSError, CorruptError, KeyError, TypeError):
        return ""
