"""Claims of the room `decoding`."""
