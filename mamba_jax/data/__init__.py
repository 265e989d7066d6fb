"""From files on disk to batches of token windows: ``pipeline.prepare`` is the entry point.

The path of the data: ``sources`` (files → documents) → ``tokenizer`` → ``cache`` (documents → one
flat memory-mapped file of tokens, made once) → ``split`` (train and held-out) → ``windows`` (random
access) → ``pipeline`` (shuffled, endless, resumable by a single integer).
"""
