"""Training a face adapter on photos: prepare data, pair them, learn, evaluate, keep. `loop` trains any task."""
