"""Loads one tensor of a model."""

from torch import Tensor

from fedlora.errors import ModelError


def put(name: str, place: Tensor, x: Tensor) -> None:
    """Copy x to its place, which has its shape: a smaller one would be spread over it.

    Raises:
        ModelError: it is of another shape.
    """
    if x.shape != place.shape:
        raise ModelError(f"{name}: shape {tuple(x.shape)}, must be {tuple(place.shape)}")
    place.copy_(x)
