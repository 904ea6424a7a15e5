"""The parts of a training step for which the machine decides how they are computed; `choices.py` decides.

Each fast path has its plain form beside it, and tests compare the two. Imports nothing of data or model.
"""
