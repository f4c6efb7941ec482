"""``python -m dlfast``."""

import sys

from dlfast.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
