"""Verify: ask the live endpoint, and prove that what it serves is what was trained."""
