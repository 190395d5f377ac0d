"""`python -m flows.services`."""

import sys

from flows.services.servers import main

if __name__ == "__main__":
    sys.exit(main())
