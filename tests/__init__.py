"""The tests, in folders that mirror the packages; ``whole/`` runs the program, ``gpu/`` needs a CUDA device."""

import os

# Before torch is imported, here and in the processes that tests start: tiny models are slower with more threads, and
# several test processes at once would wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
