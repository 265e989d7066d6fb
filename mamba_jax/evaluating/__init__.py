"""From checkpoints to measured quality: perplexity of documents, tasks of lm_eval."""
