"""How the parts of the avatar model are trained: VAE, text encoder, UNet, ControlNet, face embedder."""
