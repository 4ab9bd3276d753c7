"""What the README's numbers and the demo's output come from. Nothing in `dscheck` imports it."""
