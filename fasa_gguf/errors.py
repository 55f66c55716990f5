"""The one exception that users see."""


class FasaError(Exception):
    """One clear sentence: the file or key, what was expected, what was found, what to run next."""
