"""Which clients should run now: signals of carbon, price and time decide, hooks start and drain.

`config.py` reads what an operator wrote, `signals.py` and `remote.py` read signals, `policy.py` decides
(pure), `life.py` carries a decision out through `hooks.py`, `books.py` says what it took. May import
`run`, `coordination`, `rules` and what lies below; never `server`, `site` or `launch`: clients are other
programs.
"""
