"""Check: everything about a recipe that can be known to be wrong before long work starts."""
