"""`python -m reward_server`: one server process."""

import sys

from reward_server.serve import main

if __name__ == "__main__":
    sys.exit(main())
