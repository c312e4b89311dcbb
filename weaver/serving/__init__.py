"""A plug-in of vLLM that runs converted models as they lie on disk."""
