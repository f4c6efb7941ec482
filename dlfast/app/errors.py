"""The one exception that means: the program was used wrongly, or its files are not usable.

The command line prints its message as one line and exits with status 2; anything else is a bug and keeps
its traceback.
"""


class UsageError(Exception):
    """Something the user can put right: an unknown name, a missing folder, a corrupt file.

    The message is one line that names the option or the file at fault.

    >>> raise UsageError("--lr must be positive, got -1.0")
    Traceback (most recent call last):
        ...
    dlfast.app.errors.UsageError: --lr must be positive, got -1.0
    """


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, or its type where it has none.

    >>> one_line(ValueError("first\\n  second"))
    'first second'
    >>> one_line(EOFError())
    'EOFError'
    """
    return " ".join(str(error).split()) or type(error).__name__
