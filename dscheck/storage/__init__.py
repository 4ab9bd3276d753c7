"""Where the bytes go: the protocol in `base`, one module a medium."""
