"""A process that runs one command line after another: arguments come in as lines of JSON, what it did goes out so."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback

from wsm.settings import preset_environment


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    preset_environment(os.environ)
    from bench_infer import command_line

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints by itself is no answer
    for line in sys.stdin:
        out, err = io.StringIO(), io.StringIO()
        code: int | None = None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = command_line(json.loads(line))
            except BaseException:
                traceback.print_exc()
        answers.write(json.dumps([code, out.getvalue(), err.getvalue()]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
