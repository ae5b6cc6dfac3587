"""What must be there after kills, hangs and full disks."""
