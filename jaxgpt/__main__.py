"""`python -m jaxgpt`."""

from jaxgpt.cli import main

raise SystemExit(main())
