"""`make bench`: every comparison whose figures the documents show."""

import sys

from benchmarks import versus

sys.exit(versus.main())
