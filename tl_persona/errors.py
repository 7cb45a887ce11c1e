"""The errors a caller may want to catch, one small family.

Every message names the sample or file, says what was seen, and what to do next. Errors that stand for bad
arguments are `ValueError`s too, a missing vector is a `FileNotFoundError`, a missing package an `ImportError`,
so code that catches the built-in kinds goes on working.
"""


class TLPersonaError(Exception):
    """Base of everything this package raises on purpose."""


class InputError(TLPersonaError, ValueError):
    """A sample, option or tensor that cannot be used as given."""


class PromptError(InputError):
    """A chat template and a sample from which no provably right token spans follow."""


class MaskError(InputError):
    """A token mask that selects nothing, or does not fit its sample."""


class HookError(InputError):
    """A layer or hook name the model does not have, or that has no `d_model` axis."""


class NonFiniteError(TLPersonaError, ArithmeticError):
    """A pooled activation holds NaN or infinity."""


class ModelError(TLPersonaError):
    """A model that cannot be loaded, or not in the wanted form."""


class ModelMismatchError(ModelError):
    """A hooked model that is another function than the transformers model it was made from."""


class MissingDependencyError(ModelError, ImportError):
    """An optional package is not installed; the message has the install command."""


class StoreError(TLPersonaError):
    """A saved artifact that cannot be read, written or trusted."""


class StoreMismatchError(StoreError, ValueError):
    """What is to be saved does not fit what the store already holds."""


class NotStoredError(StoreError, FileNotFoundError):
    """Nothing is stored under the asked-for name."""


class CorruptFileError(StoreError, ValueError):
    """A saved file is truncated, altered or of an unknown version."""


class RemoteError(TLPersonaError):
    """A remote run that did not come to its end; the original error is chained."""


class RemoteUnavailableError(RemoteError, ConnectionError):
    """The server could not be reached, restarted or stayed silent until the deadline: run again to continue."""


class RemoteMemoryError(RemoteError, MemoryError):
    """The server ran out of memory even for one layer of one sample."""


class RemoteRefusedError(RemoteError):
    """The server will not run this, now or later: key, model, versions, or a fault in the request."""
