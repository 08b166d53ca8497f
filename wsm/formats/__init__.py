"""Weight formats: how a layer's matrices lie at rest, one file a format (docs/FORMATS.md)."""
