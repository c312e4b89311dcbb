"""Code that travels with a model folder and runs without weaver."""
