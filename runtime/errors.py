"""Errors a user can fix. Each message is one sentence: what was found, where, and what to do."""


class UserError(Exception):
    """Invalid input, parameters or environment, found by a command."""


class ModelError(ValueError):
    """Invalid weights, configuration or input, found by the network's code."""


def one_line(error: BaseException) -> str:
    """Return the message of `error` on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
