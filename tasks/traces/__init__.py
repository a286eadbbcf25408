"""The durable queue of the gateway's traces, and the drain that delivers each of them once."""
