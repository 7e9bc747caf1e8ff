"""The frozen causal language model: loading it, and finding out how it is built."""
