"""The one exception of the package that is meant for the user rather than for a programmer."""


class GenarmError(ValueError):
    """A mistake of the user's that one line explains: a malformed row, a missing folder, settings that clash.

    The command line prints the message without a traceback and exits with status 2.
    """
