"""``python -m deepseek`` is the command ``deepseek``."""

import sys

from deepseek.cli import main

sys.exit(main())
