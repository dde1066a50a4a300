"""`python -m matrixinfer`."""

from matrixinfer.cli import main

raise SystemExit(main())
