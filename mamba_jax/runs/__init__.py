"""A run on disk: its metrics and log, how it stands, its background record and exit status."""
