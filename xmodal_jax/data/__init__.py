"""Datasets on disk, the order of examples, decoding, tokenizers and batches."""
