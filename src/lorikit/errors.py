"""What Lorikit raises on purpose: one class for each documented exit code.

A message says what was wrong, where, what is allowed and what to do, in one or two lines. The command line prints it to
stderr without a traceback and exits with `exit_code`; everything else that escapes is a bug and exits with 1.
"""


class LorikitError(Exception):
    """Base of every error that a user can cause or mend."""

    exit_code = 1


class ConfigError(LorikitError, ValueError):
    """A setting or flag is unknown, impossible or contradicts another one."""

    exit_code = 2


class DataError(LorikitError, ValueError):
    """Rows that cannot be read, or that would train something other than what they say."""

    exit_code = 3


class ModelError(LorikitError):
    """A model, tokenizer, adapter, hub or device that is missing, damaged or does not fit."""

    exit_code = 4


class DivergedError(LorikitError):
    """The loss or the gradient became NaN or infinite."""

    exit_code = 5


class OutOfMemoryError(LorikitError):
    """The device or the host has too little memory for the smallest possible step."""

    exit_code = 6


class DiskError(LorikitError):
    """A disk is full, read-only or failing."""

    exit_code = 7


class Interrupted(LorikitError):
    """A signal stopped the run after its state was saved; the same command resumes it."""

    exit_code = 75
