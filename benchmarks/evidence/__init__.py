"""Which plan of layers learns what: tiny models of equal size over tasks and seeds."""
