"""The text of probe.py, which is sent to a cluster; importing that module would need Ray here.

Ring: edge (disk).
"""

from pathlib import Path

MARK = "TATARA-PROBE "


def read_probe() -> str:
    """Return the source that a node's Python runs."""
    return Path(__file__).with_name("probe.py").read_text()
