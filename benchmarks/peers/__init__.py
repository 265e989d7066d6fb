"""Other implementations of the same work; each imports its library only when it is used."""
