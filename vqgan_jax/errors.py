"""Errors that a command shows as one line: what is wrong, where, and what to do."""


class DataError(ValueError):
    """Data that cannot be used; the message says what, where and what to do."""


class UnreadableImage(DataError):
    """One image that cannot be decoded, because its file is damaged or no image at all."""
