"""What tasks show in the Prefect UI: progress bars, tables, pictures, links.

Shared by the `task.py` files; beside them the only module that knows Prefect. Showing is never
worth a failed run: when the API is away, the log says so and the work goes on.

Ring: task.
"""

import base64
import logging
from collections.abc import Callable
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
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    create_image_artifact(image_url=url, key=key, description=description)


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
