"""`python -m pilot.site`: a worker group; started by `handle.py`, not by hand."""

from pilot.site.group import main

main()
