"""Training of the avatar Stable Diffusion and of the Face Fusion adapter: one loop, four tasks."""
