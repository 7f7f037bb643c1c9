"""Command-line tools. Each one is a console script and also runs with `python -m`."""
