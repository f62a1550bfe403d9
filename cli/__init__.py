"""The command line `l2m`."""
