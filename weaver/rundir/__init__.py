"""A run directory: its stages' folders, its lock, and whether a stage has to run."""
