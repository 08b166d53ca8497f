"""A process that runs one command line after another: arguments come in as lines of JSON, what it did goes out so.

One whose standard streams are to be broken runs in a copy of this process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence

from wsm.settings import preset_environment

LIMIT_S = 100
"""Less than what the runner waits for an answer."""


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    preset_environment(os.environ)
    from bench_infer import command_line

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints by itself is no answer
    for line in sys.stdin:
        argv, streams = json.loads(line)
        if streams:
            answers.write(json.dumps(_with_streams(argv, streams)) + "\n")
            answers.flush()
            continue
        out, err = io.StringIO(), io.StringIO()
        code: int | None = None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = command_line(argv)
            except BaseException:
                traceback.print_exc()
        answers.write(json.dumps([code, out.getvalue(), err.getvalue()]) + "\n")
        answers.flush()


def _with_streams(argv: Sequence[str], streams: Sequence[str]) -> tuple[int, str, str]:
    """Exit code and what was printed on the streams that are open."""
    import bench.run.ranks  # noqa: F401 - torch, once for all copies
    from bench_infer import main as script

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull, "rb") as nothing:
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT_S)  # a hang becomes an exit code
            for number, (how, file) in enumerate(zip(streams, (nothing, out, err), strict=True)):
                _break(number, how, file.fileno())
            sys.argv = ["bench_infer.py", *argv]
            os._exit(script())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, err):
            file.seek(0)
        return code, out.read().decode(), err.read().decode()


def _break(number: int, how: str, file: int) -> None:
    """Make the stream of this number what ``how`` says; if it is open, ``file``."""
    if how == "closed":
        os.close(number)
    elif how == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)
        os.close(writer)
    else:
        os.dup2(os.open("/dev/full", os.O_RDWR) if how == "full" else file, number)


if __name__ == "__main__":
    main()
