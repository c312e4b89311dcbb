"""Conversion methods: pure functions of one layer's tensors."""
