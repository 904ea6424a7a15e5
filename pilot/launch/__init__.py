"""What `pilot run` needs of Flower, from outside: connections, a SuperLink of its own, a run's fate.

Only `pilot.cli` imports this; nothing of it runs in a ServerApp or ClientApp.
"""
