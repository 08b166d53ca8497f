"""Keys and values of a model: the cache, how they are stored, which blocks a step attends to."""
