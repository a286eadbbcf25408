"""Provenance: from a served answer to the data rows behind it, and from a data row to the models it went into."""
