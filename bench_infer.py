#!/usr/bin/env python3
"""Runs LLaMA models larger than the GPU and tells where the time went; see README.md."""

from __future__ import annotations

import os
import sys

from wsm.settings import preset_environment, set_by_user


def main() -> int:
    """The command line's exit code."""
    user_set = set_by_user(os.environ)
    preset_environment(os.environ)  # before torch, whose OpenMP reads its variable once
    try:
        from bench.cli.main import main as command_line

        return command_line(sys.argv[1:], user_set)
    except KeyboardInterrupt:
        print("bench_infer.py: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(
            f"bench_infer.py: the package {error.name} is not installed here: run `make bench` once, then "
            "`.venv/bin/python bench_infer.py`",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
