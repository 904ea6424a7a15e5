"""What a run looks like to people: an HTML page, made from a run's directory alone (`pilot report`), or kept up
to date (`pilot dashboard`).

May import `run.events`, `rules`, `wire` and what lies below; no torch, no Flower, no Redis, and nothing of the
server's memory. `timeline`, `measures` and `figures` are pure: events in, intervals, numbers and charts out.
"""
