"""Claims of the room `merging`."""
