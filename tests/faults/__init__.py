"""Seeded faults in what the program reads: it gives the right tokens, or a documented exit code and one sentence."""
