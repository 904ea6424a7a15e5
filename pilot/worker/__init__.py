"""Training on a site.

`handle.py` is the ClientApp's end, `group.py` (`python -m pilot.worker`) the processes and their lifetime,
`loop.py` one round on each of them, `stop.py` all stop sources → one decision, `wire.py` the frames
that both ends of the Unix socket speak.
"""
