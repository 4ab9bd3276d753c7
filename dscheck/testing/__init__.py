"""A kit for those who write plug-ins, and for our own tests: doubles that keep the contracts of the real ones."""
