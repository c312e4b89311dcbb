"""The conversion of one FFN: its profile, split, router, and trials of it."""
