"""Runs that outlive the terminal: who runs in an output_dir, where its log is, how it ended."""
