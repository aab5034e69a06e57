"""seqaware: distributed training of causal language models with discounted log-suffix weighting."""

__version__ = "0.1.0"
