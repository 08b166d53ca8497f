"""This project beside others, on one machine, in one shape: ``python -m tests.peers OUT [part …]``."""
