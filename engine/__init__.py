"""Local learning: cut a network into blocks and train each with its own loss; no gradient crosses a boundary."""
