"""From documents to training rows: encode, pack once per shard, serve from a memory-mapped file.

In the order in which a token passes: `encoder`, `packing`, `packer` (the process), `cache`, `stream`; `prepare`
packs ahead of a run. May import `source` and `tokenizer`, nothing of the model.
"""
