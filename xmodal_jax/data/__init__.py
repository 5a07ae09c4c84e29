"""Data sets on disk, the order of examples, decoding, tokenizers and batches."""
