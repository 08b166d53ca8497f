"""The result: its keys, its file, its statistics."""
