"""Evaluates checkpoints: perplexity of documents, built-in tasks and tasks of lm_eval."""
