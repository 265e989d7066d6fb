"""Checkpoints on disk: the folder's format, the arrays in it, and how a run resumes from one."""
