"""What a root's storage gives, and what dscheck reaches of it: the measuring behind `dscheck probe`."""

from dscheck.probe.disk import Way, read_file, write_file
from dscheck.probe.run import Findings, Rate, Reached, probe

__all__ = ["Findings", "Rate", "Reached", "Way", "probe", "read_file", "write_file"]
