"""The model: configuration, checkpoints, tokenizers, transformer and generation. Knows nothing of memory tiers."""
