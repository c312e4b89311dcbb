"""One file per stage: load inputs, loop over layers, call the method, write artifacts."""
