"""A least-squares problem whose rows come in parts."""
