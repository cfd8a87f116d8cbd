# SPDX-License-Identifier: Apache-2.0
"""``python -m deepcomm.cli``: the ``deepcomm`` command where scripts are not on the path."""

import sys

from deepcomm.cli import main

if __name__ == "__main__":
    sys.exit(main())
