"""`dscheck ls | inspect | verify | probe`: what a root holds, without a GPU, and for `ls` without torch or pyarrow."""

from dscheck.cli.app import main

__all__ = ["main"]
