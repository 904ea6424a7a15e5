"""What a run is on disk: its state between two rounds, snapshots, directory, results, events, quarantine.

May import `rules`, `wire`, `plan` and nanochat's files and checkpoints; nothing here talks to Flower or Redis.
"""
