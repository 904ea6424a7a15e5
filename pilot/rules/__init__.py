"""Pure rules: when a round ends, which client gets which rows, what may be merged, what the outer step does.

No I/O, no clock of their own, no Flower, Redis, W&B or nanochat: functions and books that tests call with
tables.
"""
