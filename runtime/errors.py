"""Errors a user can fix. Each message is one sentence: what was found, where, and what to do."""

import errno


class UserError(Exception):
    """Invalid input, parameters or environment, found by a command."""


class ModelError(ValueError):
    """Invalid weights, configuration or input, found by the network's code."""


def storage_fault(error: OSError) -> str | None:
    """Return one sentence for a full or read-only disk or a missing permission; None for any other error."""
    place = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}no space left on its disk; free some and run the same command again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and place:
        return f"{place}{(error.strerror or '').lower()}; correct its permissions, or name another folder"
    return None


def one_line(error: BaseException) -> str:
    """Return the message of `error` on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
