"""A round, as the one process that leads it sees it: `round_loop.py` reads like docs/protocol.md.

May import `run`, `coordination`, `rules`, `wire` and nanochat; never `site`: the two sides meet in messages
only.
"""
