"""What a checkpoint says about itself: names, records, plans and plain objects, and how each becomes bytes and back."""
