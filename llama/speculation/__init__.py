"""More tokens a pass: drafts propose trees of tokens, one pass verifies them, and what the model drew is accepted."""
