"""Straight lines of verbs; what runs is a named recipe.

Loading any flow lets the lines of `tasks` through to Prefect's handlers (with
PREFECT_LOGGING_EXTRA_LOGGERS=tasks also to the UI); Prefect attaches those handlers but leaves
the level at the root's WARNING.
"""

import logging

logging.getLogger("tasks").setLevel(logging.INFO)
