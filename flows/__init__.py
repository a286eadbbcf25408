"""Straight lines of verbs; what runs is a named recipe."""
