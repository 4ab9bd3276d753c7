"""`dscheck ls | inspect | verify | plan | probe`: what a root holds and gives. `ls` needs neither torch nor pyarrow."""

from dscheck.cli.app import main

__all__ = ["main"]
