"""What importing a flow does to Python's garbage collector, looked at in fresh interpreters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _told(code: str) -> str:
    """Return the last line that a fresh interpreter prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_no_full_collection_while_a_flow_is_imported():
    seen = "import gc; seen = []; gc.callbacks.append(lambda phase, info: seen.append((phase, info['generation'])))"
    assert _told(f"{seen}; import flows.finetune; print(seen.count(('start', 2)), len(seen) < 200)") == "0 True"


@pytest.mark.parametrize("flow", ["finetune", "drain"])
def test_collector_is_left_as_it_was(flow: str):
    state = "gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()"
    assert _told(f"import gc; was = {state}; import flows.{flow}; print(was == ({state}))") == "True"


def test_collector_that_was_off_stays_off():
    assert _told("import gc; gc.disable(); import flows.finetune; print(gc.isenabled())") == "False"


def test_objects_that_somebody_froze_stay_frozen():
    code = "import gc; gc.freeze(); was = gc.get_freeze_count(); import flows.prefect_flow; print(gc.get_freeze_count()"
    assert _told(f"{code} >= was * 0.9, gc.isenabled())") == "True True"  # some die by their reference count


def test_cycles_of_the_import_are_freed_by_the_next_full_collection():
    assert int(_told("import flows.prefect_flow, gc; print(gc.collect())")) > 500


def test_collector_goes_on_after_an_import_that_fails():
    code = """
import gc, sys
sys.modules["prefect"] = None  # Prefect is not installed
try:
    import flows.prefect_flow
except ImportError:
    print(gc.isenabled(), gc.get_freeze_count())
"""
    assert _told(code) == "True 0"
