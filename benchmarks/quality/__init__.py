"""What federation costs in learning: a laboratory of whole federations in one process (`python -m
benchmarks.quality`).

`laboratory.py` trains one case (`case.py`), `cases.py` names the experiments, `text.py` makes rows of a
directory of text, `picture.py` draws the curves.
"""
