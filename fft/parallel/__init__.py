"""How ranks share one model: the mesh, the parts of parameters, the tokens of a row."""
