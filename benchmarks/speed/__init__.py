"""Times of layers and models, interleaved with what they are compared with."""
