"""What is wrong with a run, found in the numbers that it recorded.

``signals`` reads a run's ``metrics.jsonl`` as arrays; a rule is a pure function of them
(``learning``, ``gradients``, ``structure``, ``operation``); ``rules`` lists and applies them all;
``text`` tells the result.
"""
