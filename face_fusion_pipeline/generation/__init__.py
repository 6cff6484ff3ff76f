"""What the commands and the app share: loading a model, reference crops, and pictures that say what they are."""
