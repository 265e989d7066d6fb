"""Many runs of one config: their settings, their order, where they run, and their results."""
