"""``python -m weaver`` is the ``weaver`` command."""

from weaver.cli.app import main

main()
