"""Children that never outlive us, who our ancestors are, and where directories with sockets are made.

Knows nothing of rounds or models; standard library, psutil and redis only.
"""
