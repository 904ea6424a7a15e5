"""How runs are now: from the events of a run's directory, from Redis, or from both; for people and as JSON.

May import `fleet` (what is known of this machine), `page` (who did what when), and what lies below. All but
`sources.py` is pure, or only follows files. Neither torch nor nanochat: `pilot status` answers at once.
"""
