"""Methods: what is learned from, between the views of a batch and the gradient."""
