"""The way of rows from the disk: mapped ahead, verified, scored, shortlisted."""
