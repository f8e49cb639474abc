"""For all tests: no deadlines, as no test is timed; and the command line as a user gives it."""

import signal
import sys

import pytest
from hypothesis import settings

from flowopd_eval import cli

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# Begun in a shell's background, the tests would ignore Ctrl-C, and so would the processes that they interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``flowopd-eval ...`` in this process; returns exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["flowopd-eval", *map(str, arguments)])
        code = 0
        try:
            cli.run()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
