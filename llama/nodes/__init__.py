"""Several nodes a row in one pass: trees of tokens, and attention that does not care what stands beside a node."""
