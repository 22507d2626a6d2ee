"""Models: a specification, one backbone, and a file per kind of data."""
