"""Merge: an adapter's deltas into its base, tensor by tensor, with a ledger of every one."""
