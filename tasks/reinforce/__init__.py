"""Reinforce: learn from rewards (GRPO)."""
