"""`python -m banger.cli` is `banger`."""

from banger.cli.main import main

main()
