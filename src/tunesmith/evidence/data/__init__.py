"""Claims of the room `data`."""
