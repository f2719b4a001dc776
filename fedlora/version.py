"""The version, where whoever asks imports nothing else."""

__version__ = "0.1.0"
