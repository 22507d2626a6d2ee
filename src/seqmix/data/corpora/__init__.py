"""Real texts that no hub is needed for: one file per corpus, exporting `CORPUS`."""
