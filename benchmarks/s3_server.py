"""Run a command beside an S3 server of its own, which it finds in its environment: the bucket is `demo`.

python -m benchmarks.s3_server python -m benchmarks.demo --root s3://demo/runs
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dscheck.testing.servers import SeaweedFS


def main() -> int:
    if not sys.argv[1:]:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="dscheck-s3-") as folder, SeaweedFS(Path(folder)) as server:
        server.make_bucket("demo")
        return subprocess.run(sys.argv[1:], env=os.environ | server.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
