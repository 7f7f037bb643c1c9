"""Command-line tools; each is a console script and runs with `python -m` as well."""
