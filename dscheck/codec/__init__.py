"""Blocks of a data file, smaller: zstd, with the bytes of elements in planes where that helps. Lossless.

`choice` says which codec a tensor has, `encode` and `decode` turn raw blocks into stored ones and back. What is stored
about them is in dscheck/manifest/blocks.py.
"""
