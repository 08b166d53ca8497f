"""The benchmark harness behind bench_infer.py: measuring, results, provenance and the command line."""

__version__ = "0.1.0"
