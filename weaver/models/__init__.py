"""Finding, loading, capturing and converting the GLU FFNs of Hugging Face models."""
