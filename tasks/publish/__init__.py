"""Publish: the merged model to the Hub, or to a local folder in Hub layout; then read back."""
