"""Encoders of images, texts and region features; `registry` lists the image towers by name."""
