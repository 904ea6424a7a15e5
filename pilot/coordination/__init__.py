"""Every Redis key of a run: both halves of the coordinator, the connection that may fail, the Lua scripts.

May import `wire` and what lies below it; a server and a site share nothing else but messages.
"""
