"""One file per stage: load inputs, loop over layers, call the conversion, write artifacts."""
