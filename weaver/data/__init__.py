"""Text: where it comes from, and how it becomes windows of token ids."""
