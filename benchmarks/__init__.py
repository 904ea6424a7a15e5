"""Programs that print their figures as JSON, the result on the last line: `python -m benchmarks.NAME`."""
