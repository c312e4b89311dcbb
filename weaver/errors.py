"""The one exception that users see: what is wrong, why it is wrong, how to go on."""

from __future__ import annotations

import shlex
from importlib.util import find_spec


class WeaverError(Exception):
    """An error with the three lines a user needs: what, why and fix.

    Args:
        what: the object and the measured values, lower case, one sentence without a full stop.
        why: the rule or the cause.
        fix: a command that runs, or the one thing to change.
    """

    def __init__(self, what: str, *, why: str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  fix: {self.fix}"


def shell(*words: object) -> str:
    """Words of a command line as one text, each quoted where a shell would read more than it.

    Every path in a ``fix`` goes through it: the advice is copied into a shell, and a name may hold
    spaces or come out of somebody's file.
    """
    return shlex.join(map(str, words))


def require_extra(package: str, extra: str, what: str) -> None:
    """Check that a package is there which only one of weaver's extras installs.

    Args:
        package: as it is imported.
        extra: that installs it.
        what: needs it.

    Raises:
        WeaverError: it is missing.
    """
    if find_spec(package) is None:
        raise WeaverError(
            f"{what} needs the package {package}",
            why=f"it is installed with weaver's extra {extra} alone",
            fix=f"pip install 'weaver-moe[{extra}]'",
        )
