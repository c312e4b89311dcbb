"""Converted models in the formats of other runtimes, one file per target."""
