import os

# Ranks run as threads and processes on a few cores here: torch's own thread pools would only oversubscribe them.
# Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
