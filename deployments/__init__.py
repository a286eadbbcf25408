"""What runs for long: the gateway and vLLM. Starts without Prefect and without torch."""
