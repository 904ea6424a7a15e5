"""Chaos: a federation of real processes, faults at seeded random moments, and a checker of the books.

    uv run python -m benchmarks.chaos --minutes 20 --seed 1

`topology.py` runs Redis, SuperLink, SuperNodes and the run (one layer, a vocabulary of 512 tokens, the
built-in corpus) and restarts what has died; `proxy.py` is the network between them; `faults.py` draws the
plan from the seed; `injector.py` carries it out; `checker.py` reads events, snapshots and ledger afterwards
and lists every broken promise; `tour.py` puts them together; `hooks/` makes a client's worker send bad
replies. tests/chaos/ has a short tour.
"""
