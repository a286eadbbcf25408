"""What only a GPU can show; runs with torch, transformers and peft alone: python -m pytest --noconftest tests/gpu."""
