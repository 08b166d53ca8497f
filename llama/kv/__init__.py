"""Keys and values of a model: the cache, how they are stored, which blocks a step attends to."""

KV_DTYPES = ("auto", "int8")
"""What ``--kv-dtype`` may be; here, where it is read without torch."""
