"""Tests of llama.speculation."""
