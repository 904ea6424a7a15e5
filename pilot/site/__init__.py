"""Training on a client's machine: the ClientApp's end of a worker group, and the group itself.

`handle`, `in_flight` and `notice` run in the ClientApp, without torch and nanochat; `serve`, `round` and what
they need run in the group. May import `coordination`, `rules`, `wire`, `processes` and `plan`; never `server`.
"""
