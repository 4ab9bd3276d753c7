"""`dscheck ls | inspect | verify | plan | probe`: what a root holds and gives; without a GPU, and `ls` without torch."""

from dscheck.cli.app import main

__all__ = ["main"]
