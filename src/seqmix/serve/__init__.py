"""Serving: a model answers many requests at once, over HTTP."""
