"""The commands of `pilot`, a file each: its options, and what it does with what lies below.

Nothing here imports torch or nanochat when it is imported (`pilot superlink` holds neither).
"""
