"""The device mesh, and the axis of each array that is sharded over it."""
