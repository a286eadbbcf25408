"""The OpenAI-compatible gateway in front of vLLM: routing, fail-over, one trace per request."""
