"""How the ranks of one job agree: the protocol in `base`, over a store of our own or alone."""
