"""Federated LoRA fine-tuning of Hugging Face models on Flower, with an aggregation to trust."""

from fedlora.moved import keep_old_names
from fedlora.version import __version__

__all__ = ["__version__"]

keep_old_names()
