"""The flags of every verb."""
