"""A server of one model: continuous batching over recurrent states of fixed size."""
