"""fedloom: federated LoRA fine-tuning of language models, where the method is a choice."""

__version__ = "0.1.0"
