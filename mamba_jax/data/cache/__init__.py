"""Tokens on disk: shards by content, and the memory-mapped documents that they make up."""
