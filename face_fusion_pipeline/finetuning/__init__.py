"""Training Face Fusion weights for any Stable Diffusion checkpoint on one's own photos: prepare, pair, train."""
