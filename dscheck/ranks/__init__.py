"""How the ranks of one job agree: the protocol in `base`, over a store of our own or alone."""

from dscheck.ranks.base import Failed, Ok, Ranks
from dscheck.ranks.opening import open_ranks
from dscheck.ranks.solo import Solo

__all__ = ["Failed", "Ok", "Ranks", "Solo", "open_ranks"]
