"""One program that tells in under eight minutes whether Pilot is right and fast on a GPU (README.md)."""
