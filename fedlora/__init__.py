"""Federated LoRA fine-tuning of Hugging Face models on Flower, with an aggregation to trust."""

__version__ = "0.1.0"
