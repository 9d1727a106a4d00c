"""`python -m rempart`."""

from rempart.cli import main

main()
