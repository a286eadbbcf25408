"""Tests mirror the rooms: tasks/merge/delta.py -> tests/tasks/merge/test_delta.py."""
