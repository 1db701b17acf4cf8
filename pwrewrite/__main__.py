"""``python -m pwrewrite``."""

from .cli import main

main()
