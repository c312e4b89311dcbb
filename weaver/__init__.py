"""weaver: dense GLU language models into Mixture-of-Experts models, without training."""
