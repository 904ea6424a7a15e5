"""What travels: message types, tensors as bytes, Flower's records, frames on a Unix socket.

`messages`, `records`, `frames` and `jsonable` import neither torch nor nanochat, since the ClientApp uses them.
"""
