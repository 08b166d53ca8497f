"""One run: prompts, ceilings, the timing loop, and the record of it."""
