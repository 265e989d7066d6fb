"""What a model costs before it runs: parameters, FLOPs, bytes moved, and the peaks of devices."""
