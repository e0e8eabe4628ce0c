"""linchain: fine-tune language models with chain adapters, from the command line."""

__version__ = "0.1.0"
