"""The two ways a command can end badly, each with its exit code."""


class RequestError(ValueError):
    """What was asked for cannot be done as asked: a wrong name, file or combination. Exit code 2.

    The message names the value, the place and the remedy.
    """


class Unavailable(RequestError):
    """A judge lacks weights or a package. The message ends with the command that provides them.

    Where other benches can be judged, this one is reported as unavailable and they go on.
    """


def extra(name: str) -> str:
    """The command that installs an optional part of the toolkit, which is on no package index."""
    return f'`pip install -c constraints.txt -e ".[{name}]"` in the toolkit\'s folder'


class WorkError(RuntimeError):
    """The request was right and the work failed: a full disk, a model that draws NaN. Exit code 1."""
