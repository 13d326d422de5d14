"""Local learning: cut a chain into blocks, train each with its own loss, send no gradient across."""
