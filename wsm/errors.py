"""What can go wrong below the command line; ``str(error)`` is the sentence that the user reads."""


class UnusableInput(ValueError):
    """A flag, variable, prompt, checkpoint or manifest that cannot be used (exit code 2)."""


class DoesNotFit(RuntimeError):
    """The run needs more memory or disk than its budget holds (exit code 3)."""


class StoreError(RuntimeError):
    """The packed store could not be read, or is not what its manifest says (exit code 4)."""


class KVDeviceError(StoreError):
    """KV on a device of its own could not be read or written; the packed store is sound (exit code 4)."""
