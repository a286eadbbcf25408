"""One folder per verb; the nouns, knobs and errors they share stand beside this file.

Tatara is an application: its lines are meant to be read. Prefect attaches its handlers to this
logger (PREFECT_LOGGING_EXTRA_LOGGERS=tasks) but would leave the level at the root's WARNING.
"""

import logging

logging.getLogger(__name__).setLevel(logging.INFO)
