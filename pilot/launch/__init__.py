"""Flower from outside, for `pilot run` and `pilot node`: connections, SuperLink, SuperNode, a run's outcome.

Only `pilot.commands` imports this; nothing of it runs in a ServerApp or ClientApp, or imports torch.
`node` reads and writes the files that a site's ClientApps share with it (`site.in_flight`, `site.notice`).
"""
