"""`whiflash` in this process: what a process of its own would say, without its imports."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess
from unittest import mock

from whiflash_sglang.cli.app import main


def whiflash(*words: str, terminal: bool = False) -> CompletedProcess[str]:
    """terminal: what stdout says that it is."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", ["whiflash", *words]):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return CompletedProcess(words, code, out.getvalue(), err.getvalue())
