"""From documents to windows: duplicates, the held-out split, order and cuts."""
