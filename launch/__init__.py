"""Ways to start the ranks of a render. Only the command line imports this package."""
