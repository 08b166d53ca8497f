"""The benchmark harness behind bench_infer.py: measuring, results, provenance and the command line."""
