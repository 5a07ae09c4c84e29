"""Writes datasets: readers of annotations, images and region features, and the TFRecord builder.

Only `tools/prepare_data.py` and `data.inputs`, which makes the embedded dataset, import this.
"""
