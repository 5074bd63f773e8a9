"""Claims of the room `analysis`."""
