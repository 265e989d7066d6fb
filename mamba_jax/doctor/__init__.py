"""Finds what is wrong with a run from the numbers that it recorded.

``signals`` reads a run's ``metrics.jsonl`` as arrays; a rule is a pure function of them
(``learning``, ``gradients``, ``structure``, ``operation``); ``rules`` lists and applies them all;
``text`` formats the result.
"""
