"""The routed experts in Triton: imported only where they run, since Triton exists only on Linux."""
