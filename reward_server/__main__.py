"""`python -m reward_server`: one server process."""

import sys

from reward_server.processes.serve import main

if __name__ == "__main__":
    sys.exit(main())
