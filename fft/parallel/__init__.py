"""How ranks share one model: the mesh and the pipeline partition."""
