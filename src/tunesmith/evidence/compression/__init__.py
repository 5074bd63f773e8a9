"""Claims of the room `compression`."""
