"""Federated pretraining of nanochat models: who trains what, when a round ends, what is kept.

The folder is the map. Top level: entry points (`cli`, `server_app`, `client_app`) and what every room may
import (`config`, `redis_url`, `errors`, `faults`, and `plan` for those that know torch).
"""
