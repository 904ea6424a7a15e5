"""Chaos: a whole federation of real processes, faults at seeded random moments, and a checker of the books.

    uv run python -m benchmarks.chaos --minutes 20 --seed 1

`topology.py` runs Redis, SuperLink, SuperNodes and the run (one layer, 512 tokens of vocabulary, the built-in
corpus) and starts again what has died; `proxy.py` is the network between them; `faults.py` draws the plan
from the seed; `injector.py` lets it happen; `checker.py` reads events, snapshots and ledger
afterwards and lists every broken promise; `tour.py` puts them together; `hooks/` makes a site's worker
send bad replies. A short tour is in tests/chaos/.
"""
