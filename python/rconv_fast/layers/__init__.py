"""One rule a layer kind: how knowledge of a layer's output and of its gradient goes back to its input."""
