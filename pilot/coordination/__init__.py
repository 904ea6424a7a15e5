"""Every Redis key of a run: the server's and the client's half, the connection that may fail, the Lua scripts.

May import `wire` and what lies below it. Server and clients have nothing else in common but messages.
"""
