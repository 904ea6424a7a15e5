"""How runs are now: from the events of a run's directory, from Redis, or from both; for people and as JSON.

May import `page` (who did what when), `launch`, and what lies below. All but `sources.py` is pure, or only
follows files. Neither torch nor nanochat: `pilot status` answers at once.
"""
