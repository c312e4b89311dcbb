"""The MoE FFN forward: its definition, and the faster paths that must agree with it."""
