"""Looking inside models and their memories: one file per method."""
