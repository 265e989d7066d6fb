"""Many runs of one config: which settings, in what order, where, and what came of them."""
