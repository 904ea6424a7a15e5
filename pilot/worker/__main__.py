"""`python -m pilot.worker`: a worker group; started by `handle.py`, not by hand."""

from pilot.worker.group import main

main()
