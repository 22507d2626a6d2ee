"""Measuring: speed, memory and quality of models on this machine, and the comparison of candidates."""
