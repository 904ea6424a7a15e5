"""A run rehearsed: the real round loop on a virtual clock, over clients that train nothing.

Days of a federation pass in seconds. Rules, ledger, roster, monitor, aggregation and snapshots are those of a
run; simulated are time (`clock.py`), the machines of the clients (`client.py`), Flower and Redis between them
(`world.py`), and what happens to them (`trace.py`). May import `server` and what that may; never `site` or
`launch`.
"""
