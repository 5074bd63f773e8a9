"""Claims of the room `inference`."""
