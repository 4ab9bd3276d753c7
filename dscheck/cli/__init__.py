"""`dscheck ls | inspect | verify | plan | probe`: what a root holds, without a GPU; `ls` without torch or pyarrow."""

from dscheck.cli.app import main

__all__ = ["main"]
