"""`make bench`: every comparison whose figures the documents show."""

import sys

from benchmarks import kernels, versus

sys.exit(versus.main() or kernels.main())
