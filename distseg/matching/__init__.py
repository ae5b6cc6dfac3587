"""Matching: where references come from and what queries find in them. Arrays in, arrays out."""
