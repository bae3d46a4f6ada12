"""Which damping rule, which acceleration, and does the default choose well? `python -m bench globalization`.

Every fixed combination, today's default and LM with no options train on the same problems from the same weights, to two targets
that stand in `problems`; the verdict compares the default with the best combination on each.
"""
