"""Quality of a model: perplexity, divergence from the dense model, tasks, expert usage."""
