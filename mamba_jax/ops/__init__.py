"""Pure array functions: no Flax, no config, nothing else of this package."""
