"""A fleet: what `pilot up` and `pilot join` start on a machine and keep, and who may take part in it.

May import `launch` and what lies below it, `cryptography` and `redis`. Only `pilot.commands` and `pilot.status`
import this; nothing of it runs in a ServerApp or ClientApp.
"""
