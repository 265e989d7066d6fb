"""A run on disk: its metrics and log, its state, its background record and exit status."""
