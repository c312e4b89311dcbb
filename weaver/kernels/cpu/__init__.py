"""The MoE FFN on a CPU in C++: compiled at first use, cached, and optional."""
