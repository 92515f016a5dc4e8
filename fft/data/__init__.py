"""Token tables: their contract, how they are written, the deterministic order of their samples, micro-batches."""
