"""How far two ways to compute the same activations may lie apart before one of them counts as wrong."""

TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest difference relative to the norm, by parameter dtype: several roundings of a long sum, not more."""


def tolerance_of(dtype: str) -> float:
    """The tolerance for a parameter dtype; a quantized one is held to that of float32.

    Example:
        >>> tolerance_of("bfloat16"), tolerance_of("int8")
        (0.05, 1e-05)
    """
    return TOLERANCE.get(dtype, TOLERANCE["float32"])
