"""The way of rows to the disk: checked, queued, hashed, written and committed."""
