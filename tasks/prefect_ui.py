"""What tasks show in the Prefect UI: progress bars, tables, pictures, links; live ones while a trainer runs.

Shared by the `task.py` files; beside them the only module that knows Prefect. Showing is never
worth a failed run: when the API is away, the log says so and the work goes on.

Ring: task.
"""

import base64
import logging
import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client

from tasks.metrics import say_record

P = ParamSpec("P")
R = TypeVar("R")
logger = logging.getLogger(__name__)


def _never_fatal(show: Callable[P, R]) -> Callable[P, R | None]:
    @wraps(show)
    def shown(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return show(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever the API client raises, the step's result stands
            logger.warning("could not show an artifact in the UI (%s: %s)", type(error).__name__, error)
            return None

    return shown


@_never_fatal
def show_markdown(key: str, text: str, description: str) -> None:
    """Show a table or a text under `key` (lower case, digits, dashes)."""
    create_markdown_artifact(text, key=key, description=description)


@_never_fatal
def show_table(key: str, rows: list[dict[str, Any]], description: str) -> None:  # Any: cells are plain values
    """Show rows of equal columns; the first 200, the whole of it lies in the artifact's folder."""
    create_table_artifact(rows[:200], key=key, description=description)


@_never_fatal
def show_link(key: str, url: str, text: str) -> None:
    """Show a link."""
    create_link_artifact(url, key=key, link_text=text)


@_never_fatal
def show_picture(key: str, png: bytes, description: str) -> None:
    """Show a PNG; it is carried in the artifact itself, so that no file server is needed."""
    create_image_artifact(image_url=_png_url(png), key=key, description=description)


def _png_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


class Progress:
    """A progress bar in the UI that follows a trainer's metrics records."""

    def __init__(self, key: str, description: str) -> None:
        self.key, self.description = key, description
        self._artifact: UUID | None = None
        self._percent = -1

    def __call__(self, record: dict[str, Any]) -> None:  # Any: a metrics record
        """Move the bar; at most one request for each percent."""
        percent = int(100 * record["step"] / max(1, record["num_steps"]))
        if percent > self._percent:
            self._percent = percent
            self._show(float(percent), f"{self.description}: {say_record(record)}")

    @_never_fatal
    def _show(self, percent: float, description: str) -> None:
        if self._artifact is None:
            created: Any = create_progress_artifact(percent, key=self.key, description=description)
            self._artifact = created  # Any above: the function is typed as maybe a coroutine
        else:
            update_progress_artifact(self._artifact, progress=percent, description=description)


class Live:
    """Artifacts that are renewed in place while a trainer runs: one row each in the data base, not one each time.

    Call it with each metrics record; at most every `every_s` seconds it asks `look` for what there is to show.
    """

    def __init__(self, look: Callable[[], Mapping[str, str | bytes]], every_s: float = 15.0) -> None:
        """Args: look returns key -> Markdown text or PNG bytes; every_s is the shortest time between two looks."""
        self._look, self._every_s = look, every_s
        self._ids: dict[str, UUID] = {}
        self._last = float("-inf")

    def __call__(self, record: dict[str, Any]) -> None:  # Any: a metrics record
        """Look again when it is time."""
        if time.monotonic() - self._last >= self._every_s:
            self.renew()

    @_never_fatal
    def renew(self) -> None:
        """Look now and show what there is."""
        try:
            for key, shown in self._look().items():
                self._put(key, shown)
        finally:  # also counts the drawing: a server that is slow or away is not asked more often
            self._last = time.monotonic()

    def _put(self, key: str, shown: str | bytes) -> None:
        data = shown if isinstance(shown, str) else _png_url(shown)
        if key in self._ids:
            with get_client(sync_client=True) as client:
                # client.update_artifact would also send an event that carries the whole picture
                client.request("PATCH", "/artifacts/{id}", path_params={"id": self._ids[key]}, json={"data": data})
            return
        created: Any = (  # Any: the functions are typed as maybe coroutines
            create_markdown_artifact(shown, key=key)
            if isinstance(shown, str)
            else create_image_artifact(image_url=data, key=key)
        )
        self._ids[key] = created
