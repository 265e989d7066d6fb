"""Flax NNX modules: the parts of a layer, each holding its parameters and the maths over them.

NNX defines; ``models.build`` turns the modules into pure functions of a plain nested dict.
"""
