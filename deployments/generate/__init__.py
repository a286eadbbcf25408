"""Generate: a model's text on the terminal, token by token, from its files or from an endpoint."""
