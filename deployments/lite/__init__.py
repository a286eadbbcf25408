"""The lite model: a small model in a process of the gateway's own."""
