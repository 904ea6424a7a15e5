"""Training on a site.

`handle.py` is the ClientApp's end, `group.py` (`python -m pilot.worker`) the processes and their lifetime,
`serve.py` what each of them does with an order, `loop.py` one round of training, `inner_state.py` what the
inner optimizer carries from round to round, `ranks.py` how the processes agree, `stop.py` all stop
sources → one decision, `wire.py` the frames that both ends of the Unix socket speak.
"""
