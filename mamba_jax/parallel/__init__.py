"""Many devices as one: the mesh, and which axis of which array is divided over it."""
