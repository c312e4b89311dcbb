"""Mathematics that does not know about models, stages or files."""
