"""Keys and values that the GPU has no room for."""
