"""Children that never outlive us, and what is needed to start, find and wait for processes.

Knows nothing of rounds or models. Of pilot it imports `errors` only; else the standard library, psutil, redis.
"""
