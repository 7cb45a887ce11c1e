"""The numbers in a file of persona vectors, without torch, and without a look at whatever else lies in the file."""

import math

import numpy as np
from jaxtyping import Float

from tl_persona.artifact_header import ArtifactHeader, damaged

_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def numbers_of(data: bytes, header: ArtifactHeader) -> Float[np.ndarray, "layer d_model"]:
    """The numbers of a whole file, as they are; bfloat16 as float32.

    Raises:
        CorruptFileError: They are no floating-point matrix of the shape that the header says.
    """
    start, stop = header.tensor_range
    if header.dtype not in _KINDS:
        raise damaged(header.source, f"its tensor is {header.dtype}, not floating point of 16, 32 or 64 bits")
    kind = np.dtype(_KINDS[header.dtype])
    if stop - start != math.prod(header.shape) * kind.itemsize:
        raise damaged(header.source, f"its {stop - start} bytes are no {header.dtype} of shape {header.shape}")
    numbers = np.frombuffer(data, kind, math.prod(header.shape), start).reshape(header.shape)
    # A bfloat16 is the upper half of a float32; numpy has no such type.
    return (numbers.astype("<u4") << 16).view("<f4") if header.dtype == "BF16" else numbers
