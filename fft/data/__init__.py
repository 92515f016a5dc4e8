"""Token tables: their contract, the deterministic order of their samples, and the loader."""
