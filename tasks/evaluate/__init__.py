"""Evaluate: measure candidate, base and incumbent with the same questions, and decide by the recipe's rule."""
