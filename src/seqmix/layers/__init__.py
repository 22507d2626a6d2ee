"""Layers that several mixers share."""
