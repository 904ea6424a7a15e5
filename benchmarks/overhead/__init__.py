"""What a round costs besides training, between real processes: parts of `benchmarks.round_overhead` and
`benchmarks.links`."""
