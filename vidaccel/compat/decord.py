"""Private parts of decord."""


def decoding_errors() -> tuple[type[Exception], ...]:
    """What decord raises for a file that it cannot read; the error of a limit is exported nowhere."""
    from decord import DECORDError
    from decord._ffi.base import DECORDLimitReachedError

    return DECORDError, DECORDLimitReachedError, RuntimeError
