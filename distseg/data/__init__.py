"""From files to arrays: volumes and their geometry, the formats they come in, the cohort store they rest in."""
