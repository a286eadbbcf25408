"""Fetch: a pinned data set to parquet rows, a pinned base model to a folder."""
