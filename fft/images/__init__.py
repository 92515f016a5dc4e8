"""Images of vision-language models: sizes to grids, bytes to patches, positions. No torch, no transformers."""
