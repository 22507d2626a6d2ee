"""Learning problems with exact answers: one file per task, exporting `TASK`."""
