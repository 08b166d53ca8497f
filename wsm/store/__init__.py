"""The packed store: manifest, packing, reading, checking."""
